"""Made by scripts/gen-proto from federation.proto; not edited, not linted, and no code of ours."""
