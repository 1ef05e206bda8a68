"""How sure a classifier is of the class that each row has: what attacks on membership go by (`fedcore attack`)."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fedcore.learning.data.rows import Rows
from fedcore.learning.task import Task
from fedcore.learning.training import predict

_BATCH = 1024


def confidences(task: Task, module: nn.Module, rows: Rows) -> NDArray[np.float64]:
    """(rows,) log(p / (1 - p)) of the probability p of each row's own class (Carlini et al. 2022, arXiv:2112.03570,
    section 4.1). The rows' targets are classes, the module's outputs their logits, or one logit of class 1."""
    module.eval()
    found = []
    with torch.no_grad():
        for batch in rows.batches(_BATCH, None):
            outputs, targets = predict(task, module, batch)
            outputs, targets = outputs.double().cpu(), targets.long().reshape(-1).cpu()
            if outputs.ndim == 1 or outputs.shape[1] == 1:
                found.append(outputs.reshape(-1) * (2 * targets - 1))
                continue
            logs = torch.log_softmax(outputs, dim=1)
            own = logs.gather(1, targets[:, None])[:, 0]
            others = logs.scatter(1, targets[:, None], -torch.inf).logsumexp(dim=1)
            found.append(own - others)
    return torch.cat(found).numpy() if found else np.empty(0)
