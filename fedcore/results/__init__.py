"""The schema of results: `result.json`, `rounds.jsonl`, the rows of deployed jobs and the events of `watch`.

Code that writes them builds the records below; code that reads them reads attributes. A record is a mapping as
well, with the keys of its JSON form: `result.rounds` is `result["rounds"]`. Invariant: `from_json(to_json())`
is the same record. Values are fractions (0.01 is one point), bytes and seconds; None stands for a number that
does not exist. Nothing here opens a file: `fedcore/files/` does.
"""

from fedcore.results.arm_scores import *
from fedcore.results.attack_rows import *
from fedcore.results.grid_result import *
from fedcore.results.job_events import *
from fedcore.results.result_file import *
from fedcore.results.round_rows import *
from fedcore.results.run_facts import *
