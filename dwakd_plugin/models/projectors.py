"""The trainable maps between the two models' spaces (method, section 2)."""

from __future__ import annotations

import json
import math
import zlib
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from dwakd_plugin.errors import UserError
from dwakd_plugin.io.files import explaining_writes, json_checksum, save_tensors

PROJECTOR_FILE = Path("dwakd") / "projectors.safetensors"  # within a checkpoint or output folder

CHECKSUM = "crc32"  # of tensors and metadata, among the metadata

# The states that `t2s` reads are N(g) + N(f_tgt), of unit scale each, where the solution is for the
# raw g; on the measured pair a smaller map starts better calibrated and learns as fast.
T2S_SCALE = 0.3
RIDGE = 1e-3
# bfloat16 moves a row's norm by less than half a percent.
SIGNATURE_TOLERANCE = 0.01


class Projector(nn.Linear):
    """A linear map of a type of its own, by which an engine can tell it from a student's layers."""


class Projectors(nn.Module):
    """Four linear layers with bias between student width d and teacher width D.

    query      2d → 2D   [e_in ; e_tgt] of the student, into the space of the teacher's keys
    t2s         D → d    teacher states into the student's space
    s2t         d → D    student states into the teacher's space
    embed_t2s   D → d    teacher embeddings into the student's embedding space (soft-DTW only)

    They train beside the student and are never part of it: no exported student contains them.
    """

    def __init__(self, student_hidden_size: int, teacher_hidden_size: int) -> None:
        super().__init__()
        d, D = student_hidden_size, teacher_hidden_size
        self.query = Projector(2 * d, 2 * D)
        self.t2s = Projector(D, d)
        self.s2t = Projector(d, D)
        self.embed_t2s = Projector(D, d)


def shared_vocabulary_init(
    projectors: Projectors,
    *,
    student_head: Tensor,
    teacher_head: Tensor,
    student_embeddings: Tensor,
    teacher_embeddings: Tensor,
    t2s_scale: float = T2S_SCALE,
) -> None:
    """Sets the projectors from the tokens that both vocabularies share, by least squares.

    All four arguments are rows of the n shared tokens, in the same order: heads and embeddings,
    (n, d) and (n, D). With Ws, Wt the heads and Es, Et the embeddings, each less its mean row
    (after DSKDv2, arXiv 2504.11426)::

        t2s        scale · argmin ‖Wt − Ws Mᵀ‖   g M has the teacher's logits on shared tokens
        s2t                argmin ‖Ws − Wt M'ᵀ‖  h M' has the student's
        embed_t2s          argmin ‖Es − Et Pᵀ‖   teacher embeddings onto the student's
        query              argmin ‖Et − Es Qᵀ‖ / std(Et), for e_in and e_tgt alike: a token's query
                           resembles its key, so that attention starts on the same text

    A mean row adds the same to every logit, which the softmax ignores; leaving it in would spend
    the fit on it. `t2s_scale` is 1 where `t2s` reads the raw g. Biases become 0. Solved in float64
    with a small ridge. What `T2S_SCALE` and the rest are worth is measured in docs/projectors.md.
    """
    with torch.no_grad():
        ws, wt = _centred(student_head), _centred(teacher_head)
        es, et = _centred(student_embeddings), _centred(teacher_embeddings)
        _set_linear(projectors.t2s, t2s_scale * _least_squares(ws, wt).T)
        _set_linear(projectors.s2t, _least_squares(wt, ws).T)
        _set_linear(projectors.embed_t2s, _least_squares(et, es))
        onto_teacher = _least_squares(es, et) / et.std()
        _set_linear(projectors.query, _twice(onto_teacher))


class HeadFollower:
    """Keeps `s2t` the least-squares map between the heads while the student's head trains.

        M' = argmin ‖Ws − Wt M'ᵀ‖,  M'ᵀ = (Wtᵀ Wt + ridge)⁻¹ Wtᵀ Ws      on the n shared tokens

    The teacher's part is constant: its Cholesky factor (D, D) is kept, and an update is a product
    of (D, n) and (n, d), a block of tokens at a time, and a triangular solve.
    """

    BLOCK = 4096

    def __init__(self, shared: list[tuple[int, int]], teacher_head: Tensor) -> None:
        """shared: (teacher id, student id) of the tokens in both vocabularies."""
        self._teacher_ids, self._student_ids = torch.tensor(shared, device=teacher_head.device).T
        self._teacher_head = teacher_head.detach()
        D = teacher_head.shape[1]
        mean, gram = (
            torch.zeros(shape, dtype=torch.float64, device=teacher_head.device)
            for shape in ((D,), (D, D))
        )
        for ids in self._teacher_ids.split(self.BLOCK):
            mean += self._teacher_head[ids].double().sum(0) / len(shared)
        for ids in self._teacher_ids.split(self.BLOCK):
            centred = self._teacher_head[ids].double() - mean
            gram.addmm_(centred.T, centred)
        self._cholesky = torch.linalg.cholesky(_with_ridge(gram))
        self._mean = mean.float()

    @torch.no_grad()
    def update(self, s2t: nn.Linear, student_head: Tensor) -> None:
        """Sets the layer for the head's present weight (Vs, d); its bias becomes 0."""
        product = self._mean.new_zeros(len(self._mean), student_head.shape[1])
        ids = zip(
            self._teacher_ids.split(self.BLOCK), self._student_ids.split(self.BLOCK), strict=True
        )
        for teacher_ids, student_ids in ids:
            # The mean of the student's rows falls out: those of the teacher sum to 0.
            rows = self._teacher_head[teacher_ids].float() - self._mean
            product.addmm_(rows.T, student_head[student_ids].float())
        _set_linear(s2t, torch.cholesky_solve(product.double(), self._cholesky))


def _twice(weight: Tensor) -> Tensor:
    """Block-diagonal: the same map (D, d) for both halves of the input, (2D, 2d)."""
    zero = torch.zeros_like(weight)
    return torch.cat([torch.cat([weight, zero], 1), torch.cat([zero, weight], 1)])


def _centred(rows: Tensor) -> Tensor:
    return rows.double() - rows.double().mean(0)


def _least_squares(inputs: Tensor, targets: Tensor) -> Tensor:
    """The weight W (out, in) of the linear map that takes inputs (n, in) to targets (n, out).

    The ridge is relative to the inputs' mean square, so that it means the same at any scale.
    """
    solution: Tensor = torch.linalg.solve(_with_ridge(inputs.T @ inputs), inputs.T @ targets)
    return solution.T


def _with_ridge(gram: Tensor) -> Tensor:
    gram.diagonal().add_(RIDGE * gram.diagonal().mean())
    return gram


def _set_linear(layer: nn.Linear, weight: Tensor) -> None:
    layer.weight.copy_(weight.to(layer.weight))
    layer.bias.zero_()


def save_projectors(projectors: dict[str, Tensor], file: Path, metadata: dict[str, str]) -> None:
    """Writes the projectors' tensors as safetensors with a checksum, complete or not at all.

    Raises UserError where they cannot be written.
    """
    tensors = {name: tensor.contiguous().cpu() for name, tensor in projectors.items()}
    with explaining_writes(file, "Free some space, and run it again."):
        file.parent.mkdir(parents=True, exist_ok=True)
        save_tensors(tensors, file, metadata | {CHECKSUM: _checksum(tensors, metadata)})


def _checksum(tensors: dict[str, Tensor], metadata: dict[str, str]) -> str:
    """CRC-32 of all that a file of projectors holds; safetensors has none."""
    value = json_checksum(metadata)
    for name, tensor in sorted(tensors.items()):
        value = zlib.crc32(f"{name} {tensor.dtype} {list(tensor.shape)}".encode(), value)
        value = zlib.crc32(tensor.contiguous().flatten().view(torch.uint8).numpy().data, value)
    return f"{value:08x}"


def load_projectors(projectors: Projectors, file: Path, metadata: dict[str, str]) -> None:
    """Reads projectors that `save_projectors` wrote for the same pair of models.

    Raises UserError where the file is missing, damaged, or belongs to another pair. Of each entry
    of `metadata` that the file has too: `student` and `teacher` must be the same names, unless both
    have that model's `head_signature` (`student_head`, `teacher_head`), which then decides.
    """
    tensors, found = read_projectors(file)
    differing = [
        f"  {key}: {found[key]} in the file, {value} in this run"
        for key, value in metadata.items()
        if key in found and not _agree(key, found, metadata)
    ]
    expected = {name: tuple(tensor.shape) for name, tensor in projectors.state_dict().items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if shapes != expected:
        differing.append(f"  shapes: {shapes} in the file, {expected} in this run")
    if differing:
        raise UserError(
            f"The projectors {file} belong to another pair of models:\n" + "\n".join(differing)
        )
    _set_whole(projectors, tensors)


@torch.no_grad()
def _set_whole(projectors: Projectors, tensors: dict[str, Tensor]) -> None:
    """Sets the projectors, whole or sharded by FSDP2, to whole tensors, which every rank has."""
    for name, parameter in projectors.named_parameters():
        value = tensors[name].to(parameter.device, parameter.dtype)
        if isinstance(parameter, DTensor):
            value = distribute_tensor(
                value, parameter.device_mesh, parameter.placements, src_data_rank=None
            )
        parameter.copy_(value)


def read_projectors(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a file of `save_projectors`.

    Raises UserError where it is none, or its checksum differs. Files of before there were checksums
    have none to compare.
    """
    try:
        with safe_open(file, framework="pt") as stored:
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
            metadata = dict(stored.metadata() or {})
    except (OSError, SafetensorError) as error:
        raise UserError(f"The projectors {file} cannot be read: {error}") from error
    expected = metadata.pop(CHECKSUM, None)
    if expected is not None and expected != _checksum(tensors, metadata):
        raise UserError(
            f"The projectors {file} are damaged: their checksum does not match. Take another file "
            "(of a run: another checkpoint's), or remove it and have it written again."
        )
    return tensors, metadata


def head_signature(head: Tensor) -> str:
    """Tells one model's head (V, d) from another's: its shape and the norms of eight rows.

    The same model has the same signature wherever it lies, and to `SIGNATURE_TOLERANCE` in whatever
    precision it is held.
    """
    rows = torch.linspace(0, head.shape[0] - 1, 8, device=head.device).long()
    norms = head.detach()[rows].float().norm(dim=1).tolist()
    return json.dumps([*head.shape, *(float(f"{norm:.5g}") for norm in norms)])


def _agree(key: str, found: dict[str, str], given: dict[str, str]) -> bool:
    """Whether an entry of two files' metadata stands for the same model."""
    if key.endswith("_head"):
        try:
            theirs, ours = [list(map(float, json.loads(each[key]))) for each in (found, given)]
        except (TypeError, ValueError, RecursionError):  # not as `head_signature` writes it
            return False
        return len(theirs) == len(ours) and all(
            math.isclose(a, b, rel_tol=SIGNATURE_TOLERANCE)
            for a, b in zip(theirs, ours, strict=True)
        )
    head = f"{key}_head"
    return (head in found and head in given) or found[key] == given[key]
