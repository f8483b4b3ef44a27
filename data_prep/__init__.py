"""Raw text to training shards. Knows nothing of `distill`; each stage is one module and one subcommand."""
