"""Studies that use the framework as its users do: one command each, ending in a table and a picture."""
