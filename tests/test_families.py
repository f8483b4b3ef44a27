"""Names of checkpoints, as published: step, stage and tokens; what is not clear is refused."""

from __future__ import annotations

import pytest

from distill.trajectory.families import read_names

OTHERS = ["main", "logs", "step_x", "README.md"]


@pytest.mark.parametrize(
    ("family", "source", "names", "tokens"),
    [
        ("distill", "runs/teacher", ["step_00000002", "step_00000016"], [None, None]),
        ("pythia", "hf://EleutherAI/pythia-70m", ["step2", "step16"], [4_194_304, 33_554_432]),
        ("pythia", "runs/other", ["step2", "step16"], [None, None]),
        ("olmo", "OLMo-1B", ["step2-tokens8M", "step16-tokens1B"], [8 * 10**6, 10**9]),
        ("olmo", "OLMo-2", ["stage1-step2-tokens1B", "stage1-step16-tokens2T"], [10**9, 2 * 10**12]),
        ("llm360", "Amber", ["ckpt_002", "ckpt_016"], [None, None]),
        ("fineweb", "ablation-model-fineweb-v1", ["step-000002-1BT", "step-000016-2BT"], [10**9, 2 * 10**9]),
        ("smollm2", "SmolLM2", ["step-2", "step-16"], [None, None]),
        ("smollm3", "SmolLM3-3B-checkpoints", ["stage1-step-2", "stage1-step-16"], [4_718_592, 37_748_736]),
        ("transformers", "x", ["checkpoint-2", "checkpoint-16"], [None, None]),
        ("deepspeed", "x", ["global_step2", "global_step16"], [None, None]),
    ],
)
def test_every_family_is_recognised(
    family: str, source: str, names: list[str], tokens: list[int | None]
) -> None:
    found_family, found = read_names([*OTHERS, *reversed(names)], source)
    assert found_family == family
    assert {step: (each.name, each.tokens) for step, each in found.items()} == dict(
        zip((2, 16), zip(names, tokens, strict=True), strict=True)
    )


def test_multiberts_count_thousands_of_steps_a_repository_each() -> None:
    names = [f"multiberts-seed_{seed}-step_{step}k" for seed in (0, 1) for step in (0, 20, 2000)]
    with pytest.raises(ValueError, match=r"several stages \['seed_0', 'seed_1'\]: choose with --stage"):
        read_names(names, "google")
    family, found = read_names(names, "google", stage="seed_1")
    assert (family, list(found)) == ("multiberts", [0, 20_000, 2_000_000])
    assert found[0].name == "multiberts-seed_1-step_0k"


def test_stages_that_count_on_may_be_taken_together_and_others_may_not() -> None:
    smollm3 = ["stage1-step-40000", "stage2-step-3480000", "lc-4k-to-32k-step-4000"]
    assert list(read_names(smollm3, "SmolLM3", stage=r"stage\d")[1]) == [40_000, 3_480_000]
    olmo = ["stage1-step1000-tokens5B", "stage2-ingredient1-step1000-tokens3B"]
    with pytest.raises(ValueError, match="both stage1-step1000-tokens5B and stage2.* are step 1000"):
        read_names(olmo, "OLMo-2", stage="stage.*")
    with pytest.raises(ValueError, match=r"has no stage 'stage3'; it has \['stage1', 'stage2-ingredient1'\]"):
        read_names(olmo, "OLMo-2", stage="stage3")


def test_mixed_missing_and_double_checkpoints_are_refused() -> None:
    with pytest.raises(ValueError, match=r"expected checkpoints named by one family .* got none"):
        read_names(OTHERS, "x")
    with pytest.raises(ValueError, match="both step_01 and step_1 are step 1"):
        read_names(["step_1", "step_01"], "x")
    with pytest.raises(ValueError, match=r"got \['distill', 'transformers'\]"):
        read_names(["step_1", "checkpoint-2"], "x")


def test_other_names_are_read_by_a_pattern() -> None:
    family, found = read_names(["it7-2B", "it9-3B", "main"], "x", r"it(?P<step>\d+)-(?P<tokens>\d+B)")
    assert (family, list(found), found[9].tokens) == ("custom", [7, 9], 3 * 10**9)
    with pytest.raises(ValueError, match=r"needs a group \(\?P<step>...\), it has none"):
        read_names(["it7"], "x", r"it\d+")
    with pytest.raises(ValueError, match="is no regular expression"):
        read_names(["it7"], "x", "(")
