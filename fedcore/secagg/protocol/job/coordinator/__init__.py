"""The coordinator's side of a job; `machine.JobMachine` joins its parts."""
