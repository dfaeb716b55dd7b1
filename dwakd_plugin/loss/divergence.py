"""Divergences between next-token distributions, and the chunked pass through an output head.

    N tokens   V rows of the head   C tokens of one chunk

Every divergence takes log-probabilities of shape (..., V), the target's first, and returns one
value per token (...). Callers detach the target. All are 0 at equality and none is ever negative.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from dwakd_plugin.loss.token_weights import entropy
from dwakd_plugin.recipe.schema import Divergence

SKEW = 0.1  # λ of the skewed divergences, as in DistiLLM (arXiv 2402.03898)
HEAD_MASS = 0.5  # μ of adaptive KL: probability mass that makes up the target's head
# With chunk_size "auto", the logits of one chunk in float32 take at most this share of the device's
# memory; about six tensors of that size live at once. Of all memory, not of what is free: a run and
# its resumed half must cut the same chunks to agree bit for bit.
AUTO_CHUNK_SHARE = 1 / 128
# Within that share, so many tokens: with fewer, reading the head anew for each chunk is what a
# product costs. And so many elements: more makes nothing faster. (On a CPU 64 MiB, above the 32 MiB
# up to which freed tensors stay on malloc's heap, which then grows with the number of chunks.)
AUTO_CHUNK_TOKENS = 256
AUTO_CHUNK_ELEMENTS = {"cpu": 2**24, "cuda": 2**27}


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p ‖ q) = Σ_v p (log p − log q)."""
    # F.kl_div computes the same six times slower on a CPU (its exponential is not vectorised).
    divergence: Tensor = torch.linalg.vecdot(log_p.exp(), log_p - log_q)
    return divergence


def _log_mixture(log_p: Tensor, log_q: Tensor, weight: float) -> Tensor:
    """log(weight·p + (1 − weight)·q), finite where both underflow."""
    return torch.logaddexp(log_p + math.log(weight), log_q + math.log1p(-weight))


def forward_kl(target: Tensor, student: Tensor) -> Tensor:
    """KL(target ‖ student): covers the target's modes. The paper's choice (D5)."""
    return _kl(target, student)


def reverse_kl(target: Tensor, student: Tensor) -> Tensor:
    """KL(student ‖ target): seeks the target's modes."""
    return _kl(student, target)


def skewed_forward_kl(target: Tensor, student: Tensor) -> Tensor:
    """KL(target ‖ λ·target + (1 − λ)·student), at most −log λ (DistiLLM)."""
    return _kl(target, _log_mixture(target, student, SKEW))


def skewed_reverse_kl(target: Tensor, student: Tensor) -> Tensor:
    """KL(student ‖ λ·student + (1 − λ)·target), at most −log λ (DistiLLM)."""
    return _kl(student, _log_mixture(student, target, SKEW))


def js(target: Tensor, student: Tensor) -> Tensor:
    """Jensen-Shannon: ½ KL(target ‖ m) + ½ KL(student ‖ m), m their mean; at most log 2."""
    mean = _log_mixture(target, student, 0.5)
    return 0.5 * (_kl(target, mean) + _kl(student, mean))


def adaptive_kl(target: Tensor, student: Tensor) -> Tensor:
    """Forward and reverse KL, mixed by where the two differ (AKL, arXiv 2404.02657).

        g_head, g_tail = Σ |target − student| over the target's head and tail (detached)
        AKL = (g_head · forward + g_tail · reverse) / (g_head + g_tail)

    The head is the smallest set of most likely tokens that holds half of the target's mass.
    """
    with torch.no_grad():
        target_probs, order = target.exp().sort(dim=-1, descending=True)
        gap = (target_probs - student.exp().gather(-1, order)).abs()
        mass_before = target_probs.cumsum(-1) - target_probs
        head_gap = (gap * (mass_before < HEAD_MASS)).sum(-1)
        gap_total = gap.sum(-1)
        # At equality both gaps are 0, and so are both divergences: any share will do.
        head_share = head_gap / gap_total.clamp_min(torch.finfo(gap.dtype).tiny)
    return head_share * forward_kl(target, student) + (1 - head_share) * reverse_kl(target, student)


DIVERGENCES: dict[Divergence, Callable[[Tensor, Tensor], Tensor]] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "skewed_forward_kl": skewed_forward_kl,
    "skewed_reverse_kl": skewed_reverse_kl,
    "adaptive_kl": adaptive_kl,
    "js": js,
}


class StudentStatistics(NamedTuple):
    """Per student token, each (N,): the first three carry gradients, the others are detached."""

    ce: Tensor  # −log p_s(y)
    t2s_ce: Tensor  # −log p_t2s(target)
    divergence: Tensor  # D(p_t2s ‖ p_s) at temperature τ
    entropy: Tensor  # H(p_s)
    gate: Tensor  # max_v p_t2s(v)
    t2s_correct: Tensor  # argmax p_t2s = target


class TeacherStatistics(NamedTuple):
    """Per teacher token, each (N,): the first carries a gradient, the others are detached."""

    divergence: Tensor  # KL(p_t ‖ p_s2t) at temperature τ
    entropy: Tensor  # H(p_t)
    ce: Tensor  # −log p_t(label)


def student_statistics(
    student_logits: Tensor,
    t2s_logits: Tensor,
    labels: Tensor,
    targets: Tensor,
    divergence: Divergence,
    temperature: float,
) -> StudentStatistics:
    """What the student-space terms need of each token (Eq. 3-6, 11, 12).

    Shapes: student_logits and t2s_logits (C, Vs), labels of the student's cross-entropy and targets
    of the projected teacher's (C,).
    """
    student_log_probs = student_logits.log_softmax(-1)
    ce, student_entropy = _nll(student_log_probs, labels), entropy(student_log_probs)
    t2s_log_probs = t2s_logits.log_softmax(-1)
    t2s_ce, best = _nll(t2s_log_probs, targets), t2s_log_probs.max(-1)
    if temperature != 1:
        del student_log_probs, t2s_log_probs  # before others of their size are made
        student_log_probs = _log_softmax(student_logits, temperature)
        t2s_log_probs = _log_softmax(t2s_logits, temperature)
    value = DIVERGENCES[divergence](t2s_log_probs, student_log_probs)
    return StudentStatistics(
        ce, t2s_ce, value, student_entropy, best.values.exp(), best.indices == targets
    )


def student_gradients(
    student_logits: Tensor,
    t2s_logits: Tensor,
    labels: Tensor,
    targets: Tensor,
    divergence: Divergence,
    temperature: float,
    grads: Sequence[Tensor],
) -> tuple[Tensor, Tensor]:
    """Gradients of `student_statistics` in student_logits and t2s_logits.

    The target p_t2s is detached in the divergence: cross-entropy alone trains it. Written down
    where it matters, this takes a third of autograd's passes over the logits and half its memory.

    Shapes: as above, of `grads` the first three (C,) → (C, Vs) each.
    """
    ce_grad, t2s_ce_grad, divergence_grad = (grad[:, None] for grad in grads[:3])
    student_grad = _nll_gradient(student_logits, labels, ce_grad)
    if divergence == "forward_kl":  # (p_s − p_t2s) / τ at temperature τ
        scale = divergence_grad / temperature
        student_grad.addcmul_(_softmax(student_logits, temperature), scale)
        student_grad.addcmul_(_softmax(t2s_logits, temperature), scale, value=-1)
    else:
        target = _log_softmax(t2s_logits, temperature)
        with torch.enable_grad():
            leaf = student_logits.detach().requires_grad_()
            value = DIVERGENCES[divergence](target, _log_softmax(leaf, temperature))
        student_grad += torch.autograd.grad(value, leaf, divergence_grad[:, 0])[0]
        del target, value
    return student_grad, _nll_gradient(t2s_logits, targets, t2s_ce_grad)


def _softmax(logits: Tensor, temperature: float) -> Tensor:
    return (logits if temperature == 1 else logits / temperature).softmax(-1)


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    return (logits if temperature == 1 else logits / temperature).log_softmax(-1)


def _nll(log_probs: Tensor, labels: Tensor) -> Tensor:
    return -log_probs.gather(-1, labels[:, None]).squeeze(-1)


def _nll_gradient(logits: Tensor, labels: Tensor, grad: Tensor) -> Tensor:
    """grad · (p − onehot(y)), for logits (C, V), labels (C,) and grad (C, 1)."""
    return logits.softmax(-1).mul_(grad).scatter_add_(-1, labels[:, None], -grad)


def teacher_statistics_(
    teacher_logits: Tensor, s2t_logits: Tensor, labels: Tensor, temperature: float
) -> tuple[TeacherStatistics, Tensor]:
    """What the teacher-space term needs of each token (Eq. 8, 14); always forward KL (D5).

    And the divergence's gradient (p_s2t − p_t) / τ in s2t_logits. Works in place, with one more
    tensor of the size of the logits; both inputs are lost.

    Shapes: teacher_logits and s2t_logits (C, Vt), without a graph, and the teacher's labels (C,) →
    each statistic (C,), (C, Vt).
    """
    # Shifted by the largest, exponentials never overflow; probabilities are `weights / total`.
    teacher_logits -= teacher_logits.amax(-1, keepdim=True)
    weights = teacher_logits.exp()
    total = weights.sum(-1)
    token_entropy = total.log() - torch.linalg.vecdot(weights, teacher_logits) / total
    ce = total.log() - teacher_logits.gather(-1, labels[:, None]).squeeze(-1)
    if temperature != 1:
        teacher_logits /= temperature
        torch.exp(teacher_logits, out=weights)
        total = weights.sum(-1)
    s2t_logits -= s2t_logits.amax(-1, keepdim=True)
    s2t_logits /= temperature
    teacher_logits -= s2t_logits
    divergence = torch.linalg.vecdot(weights, teacher_logits) / total - total.log()
    s2t_total = s2t_logits.exp_().sum(-1)
    divergence += s2t_total.log()
    s2t_logits /= (s2t_total * temperature)[:, None]
    s2t_logits.addcmul_(weights, (1 / (total * temperature))[:, None], value=-1)
    return TeacherStatistics(divergence, token_entropy, ce), s2t_logits


def sorted_distance(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """Σ_r |p_s(r) − p_t(r)| over ranks r, both sorted from the largest (ULD, arXiv 2402.12030).

    The smaller vocabulary is filled up with zeros. Between 0 and 2; the gradient reaches
    student_logits only.

    Shapes: (C, Vs) and (C, Vt) → (C,).
    """
    student = _softmax(student_logits, temperature).sort(dim=-1, descending=True).values
    teacher = _softmax(teacher_logits.detach(), temperature).sort(dim=-1, descending=True).values
    common = min(student.shape[-1], teacher.shape[-1])
    distance = (student[:, :common] - teacher[:, :common]).abs().sum(-1)
    # What one side has more of stands against zeros.
    return distance + student[:, common:].sum(-1) + teacher[:, common:].sum(-1)


def mapped_statistics(
    student_logits: Tensor,
    teacher_logits: Tensor,
    token_map: Tensor,
    labels: Tensor,
    divergence: Divergence,
    temperature: float,
) -> StudentStatistics:
    """`student_statistics` with the teacher's own probabilities, by `token_map`, for p_t2s.

    The teacher is a constant: `t2s_ce`, its −log p(y), takes no gradient.

    Shapes: student_logits (C, Vs), teacher_logits (C, Vt), token_map (Vt,) with −1 for a token that
    the student has no word for, labels (C,).
    """
    own = student_logits.log_softmax(-1)
    with torch.no_grad():
        theirs = _mapped_log_probs(teacher_logits, token_map, own, 1.0)
        best = theirs.max(-1)
        target = (
            theirs
            if temperature == 1
            else _mapped_log_probs(teacher_logits, token_map, own, temperature)
        )
        student_entropy = entropy(own)
    softened = own if temperature == 1 else _log_softmax(student_logits, temperature)
    return StudentStatistics(
        _nll(own, labels),
        _nll(theirs, labels),
        DIVERGENCES[divergence](target, softened),
        student_entropy,
        best.values.exp(),
        best.indices == labels,
    )


def _mapped_log_probs(
    teacher_logits: Tensor, token_map: Tensor, like: Tensor, temperature: float
) -> Tensor:
    """log Σ_{v: token_map(v) = s} p_t(v), over what has a student's token: (C, Vs).

    A token that no teacher's token is mapped to has the smallest probability that there is.
    """
    known = token_map >= 0
    probabilities = _softmax(teacher_logits.to(like.dtype), temperature)[:, known]
    # Rows are tokens here, so that each of the teacher's is one addition of a whole row.
    summed = like.new_zeros(like.shape[1], like.shape[0])
    summed = summed.index_add_(0, token_map[known], probabilities.T).T
    smallest = torch.finfo(like.dtype).tiny
    return (summed / summed.sum(-1, keepdim=True).clamp_min(smallest)).clamp_min(smallest).log()


@torch.no_grad()
def most_likely(hidden: Tensor, logits: Callable[[Tensor], Tensor], chunk_size: int) -> Tensor:
    """The token that each hidden state (N, D) predicts, a chunk of logits at a time: (N,) long."""
    return torch.cat([logits(chunk).argmax(-1) for chunk in torch.split(hidden, chunk_size)])


def tokens_per_chunk(
    chunk_size: int | Literal["auto"], vocab_size: int, device: torch.device
) -> int:
    """Tokens that go through a head of `vocab_size` rows at once."""
    if chunk_size != "auto":
        return chunk_size
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
    else:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    wanted = max(AUTO_CHUNK_TOKENS * vocab_size, AUTO_CHUNK_ELEMENTS.get(device.type, 2**24))
    return max(1, min(wanted, int(memory * AUTO_CHUNK_SHARE) // 4) // vocab_size)


class _StudentSpace(torch.autograd.Function):
    """`student_statistics` chunk by chunk, whose logits are computed again in backward.

    The weights of a sample's tokens are known only when all are through, so that the gradient in
    the head cannot be formed in forward.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        projected: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        targets: Tensor,
        logits: Callable[..., Tensor],
        settings: tuple[Divergence, float],
        chunk_size: int,
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(hidden, projected, weight, bias, labels, targets)
        ctx.logits, ctx.settings, ctx.chunk_size = logits, settings, chunk_size
        device = hidden.device.type  # backward runs outside the autocast of forward
        ctx.autocast = torch.autocast(
            device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
        )
        tokens = (hidden, projected, labels, targets)
        chunks = (torch.split(tensor, chunk_size) for tensor in tokens)
        columns = zip(
            *(
                student_statistics(
                    logits(h, weight, bias), logits(p, weight, bias), y, target, *settings
                )
                for h, p, y, target in zip(*chunks, strict=True)
            ),
            strict=True,
        )
        statistics = StudentStatistics(*(torch.cat(column) for column in columns))
        ctx.mark_non_differentiable(*statistics[3:])
        return tuple(statistics)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, projected, weight, bias, labels, targets = ctx.saved_tensors
        divergence, temperature = ctx.settings
        needed = ctx.needs_input_grad[:4]
        head = [
            None if tensor is None else tensor.detach().requires_grad_(need)
            for tensor, need in zip((weight, bias), needed[2:], strict=True)
        ]
        constant = [None if tensor is None else tensor.detach() for tensor in head]
        rows: list[list[Tensor]] = [[], []]
        sums: list[Tensor | None] = [None, None]
        tokens = (hidden, projected, labels, targets, *grads[:3])
        chunks = (torch.split(tensor, ctx.chunk_size) for tensor in tokens)
        for h, p, y, target, *chunk_grads in zip(*chunks, strict=True):
            h, p = h.detach().requires_grad_(needed[0]), p.detach().requires_grad_(needed[1])
            with torch.enable_grad(), ctx.autocast:
                outputs = ctx.logits(h, *head), ctx.logits(p, *constant)
            student_logits, t2s_logits = (output.detach() for output in outputs)
            gradients = student_gradients(
                student_logits, t2s_logits, y, target, divergence, temperature, chunk_grads
            )
            del student_logits, t2s_logits
            trained = [i for i, output in enumerate(outputs) if output.requires_grad]
            found = iter(
                torch.autograd.grad(
                    [outputs[i] for i in trained],
                    [leaf for leaf, need in zip((h, p, *head), needed, strict=True) if need],
                    [gradients[i] for i in trained],
                )
            )
            del outputs, gradients  # before the next chunk's are made
            for i, need in enumerate(needed):
                if need and i < 2:
                    rows[i].append(next(found))
                elif need:
                    total = sums[i - 2]
                    sums[i - 2] = next(found) if total is None else total.add_(next(found))
        return *(torch.cat(row) if row else None for row in rows), *sums, *[None] * 5


def student_space_statistics(
    hidden: Tensor,
    projected: Tensor,
    labels: Tensor,
    targets: Tensor,
    head: tuple[Tensor, Tensor | None],
    logits: Callable[..., Tensor],
    divergence: Divergence,
    temperature: float,
    chunk_size: int,
) -> StudentStatistics:
    """`student_statistics` of every token, a chunk of logits at a time.

    Shapes: the student's hidden states and the teacher's projected ones (N, d), labels and targets
    (N,); head is weight (V, d) and bias (V,), and `logits` takes states, weight and bias → each
    result (N,). To the projected states the head is a constant.
    """
    return StudentStatistics(
        *_StudentSpace.apply(  # type: ignore[no-untyped-call]
            hidden, projected, *head, labels, targets, logits, (divergence, temperature), chunk_size
        )
    )


class _TeacherSpace(torch.autograd.Function):
    """`teacher_statistics_` chunk by chunk, with the gradient formed in forward.

    A token's divergence depends on its own projected state alone, and the head is constant. So one
    row (D,) per token is all that backward needs, and a chunk's logits are computed once, where
    recomputing them in backward would take two more products with the head.
    """

    @staticmethod
    def forward(
        ctx: Any,
        projected: Tensor,
        hidden: Tensor,
        labels: Tensor,
        logits: Callable[[Tensor], Tensor],
        temperature: float,
        chunk_size: int,
    ) -> tuple[Tensor, ...]:
        columns, gradients = [], []
        chunks = (torch.split(tensor, chunk_size) for tensor in (projected, hidden, labels))
        for projected_chunk, hidden_chunk, labels_chunk in zip(*chunks, strict=True):
            with torch.set_grad_enabled(ctx.needs_input_grad[0]):
                leaf = projected_chunk.detach().requires_grad_(ctx.needs_input_grad[0])
                s2t_logits = logits(leaf)
            statistics, gradient = teacher_statistics_(
                logits(hidden_chunk), s2t_logits.detach(), labels_chunk, temperature
            )
            if ctx.needs_input_grad[0]:
                gradients += torch.autograd.grad(s2t_logits, leaf, gradient)
            del s2t_logits, gradient  # before the next chunk's are made
            columns.append(statistics)
        ctx.save_for_backward(torch.cat(gradients) if gradients else projected)
        divergence, *detached = map(torch.cat, zip(*columns, strict=True))
        ctx.mark_non_differentiable(*detached)
        return divergence, *detached

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return (grads[0][:, None] * gradient).to(gradient.dtype), *[None] * 5


def teacher_space_statistics(
    hidden: Tensor,
    projected: Tensor,
    labels: Tensor,
    logits: Callable[[Tensor], Tensor],
    temperature: float,
    chunk_size: int,
) -> TeacherStatistics:
    """`teacher_statistics_` of every token, a chunk of logits at a time.

    Shapes: the teacher's hidden states and the student's projected ones (N, D), the teacher's
    labels (N,), `logits` their constant head → each result (N,). The gradient reaches `projected`
    only.
    """
    return TeacherStatistics(
        *_TeacherSpace.apply(  # type: ignore[no-untyped-call]
            projected, hidden, labels, logits, temperature, chunk_size
        )
    )


def map_token_chunks(
    statistics: Callable[..., tuple[Tensor, ...]], chunk_size: int, *tokens: Tensor
) -> tuple[Tensor, ...]:
    """Apply `statistics` to chunks of tokens and join what it returns per token.

    Each chunk is recomputed in backward, so that its logits live only while it is at work: memory
    is O(chunk · V) instead of O(N · V), for one more forward through the head. Zero tokens pass as
    one empty chunk, and keep their graph.

    Shapes: each of `tokens` (N, ...) → each result (N,).
    """
    chunks = zip(*(torch.split(tensor, chunk_size) for tensor in tokens), strict=True)
    results = [
        checkpoint(statistics, *chunk, use_reentrant=False, preserve_rng_state=False)
        for chunk in chunks
    ]
    return tuple(torch.cat(column) for column in zip(*results, strict=True))
