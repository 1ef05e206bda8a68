"""The `fedcore` command and what its subcommands need; `console` is shared with the two shells."""
