"""Features by plain hooks: an MLP's output at the last position of a full forward, read and changed by hand."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from twins import reference


class HookedMlp:
    """One block's MLP of a model, in full forwards whose state at a boundary is another's."""

    def __init__(self, model: PreTrainedModel, block: int, boundary: int) -> None:
        self.model, self.block, self.boundary = model, block, boundary

    def run(self, ids, state, tokens, change=lambda row: row):
        """(margin, the MLP's output ``[D]`` at the last position before it is changed)."""
        seen = []

        def hook(module, args, output):
            seen.append(output[0, -1].clone())
            output = output.clone()
            output[0, -1] = change(output[0, -1].clone())
            return output

        handle = reference.parts(self.model).blocks[self.block].mlp.register_forward_hook(hook)
        try:
            hidden = reference.overwritten(self.model, ids, self.boundary, state)
        finally:
            handle.remove()
        y_pt, y_it = tokens
        logits = reference.readout(self.model, hidden[-1])
        return float(logits[y_it] - logits[y_pt]), seen[-1]


def activation(crosscoder, feature, rows):
    """Of one feature, of rows by label: the branches of ``rows`` alone are summed."""
    raw = crosscoder.b_enc[feature]
    for label, row in rows.items():
        at = crosscoder.labels.index(label)
        raw = raw + (row - crosscoder.mean[at]) @ crosscoder.encoder[at, :, feature]
    raw = torch.relu(raw)
    scale = sum(crosscoder.decoder[feature, at].norm() for at in range(len(crosscoder.labels)))
    return raw if raw * scale > crosscoder.threshold else torch.zeros(())
