from slmkit.toyland.registry import SHARES, TASKS, corrupt, knobs_of, rows, split_of, task, toytask
from slmkit.toyland.tasks import instructions, knowledge, reasoning, stories, talk
