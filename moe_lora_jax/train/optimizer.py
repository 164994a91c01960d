"""AdamW with linear warm-up, cosine decay and global-norm clipping."""

import optax


def warmup_cosine(learning_rate: float, warmup_steps: int, total_steps: int) -> optax.Schedule:
    """Learning rate of step i = 0, 1, ..., total_steps - 1.

        lr (i+1) / W                                    for i < W          (no step is spent at 0)
        lr (1 + cos(pi (i-W) / (T-W))) / 2              for i >= W         (from lr towards 0, which step T would have)

    Args:
        learning_rate: the peak, lr.
        warmup_steps: W.
        total_steps: T.
    """

    rise = optax.linear_schedule(learning_rate / max(warmup_steps, 1), learning_rate, warmup_steps - 1)
    decay = optax.cosine_decay_schedule(learning_rate, max(total_steps - warmup_steps, 1))
    return optax.join_schedules([rise, decay], [warmup_steps])


def adamw(
    schedule: optax.Schedule, *, weight_decay: float, max_grad_norm: float | None
) -> optax.GradientTransformation:
    """Clip the gradient to global norm `max_grad_norm` (None: do not), then AdamW with torch.optim.AdamW's constants.

        m = 0.9 m + 0.1 g;  v = 0.999 v + 0.001 g^2;  p -= lr (m^ / (sqrt(v^) + 1e-8) + weight_decay p)

    Where it differs from PyTorch: `torch.nn.utils.clip_grad_norm_` divides by (norm + 1e-6). Its state covers the
    variables that it is initialised with, and no others. Source: arXiv:1711.05101.
    """
    update = optax.adamw(schedule, b1=0.9, b2=0.999, eps=1e-8, weight_decay=weight_decay)
    return update if max_grad_norm is None else optax.chain(optax.clip_by_global_norm(max_grad_norm), update)
