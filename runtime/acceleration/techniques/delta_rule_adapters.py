"""Adapters for the layers of the gated delta rule and of Kimi delta attention."""

from hasten.acceleration.techniques.adapted_forwards import check_state, refuse_others
from hasten.kernels.recurrence.delta_rule import delta_rule, delta_rule_step
from hasten.kernels.sequence import state_dtype


def chunk_delta_rule(
    query,
    key,
    value,
    g,
    beta,
    chunk_size=64,
    initial_state=None,
    output_final_state=False,
    use_qk_l2norm_in_kernel=False,
    **others,
):
    """For `torch_chunk_gated_delta_rule` and `chunk_kimi_delta_attention`; chunks are ours."""
    refuse_others(others)
    state = None if initial_state is None else _state(initial_state, query, value)
    settings = {"decay": g, "scale": query.shape[-1] ** -0.5, "l2_norm": use_qk_l2norm_in_kernel}
    output, state = delta_rule(query, key, value, beta, initial_state=state, return_state=True, **settings)
    return output, state if output_final_state else None


def step_delta_rule(
    query,
    key,
    value,
    g,
    beta,
    initial_state=None,
    output_final_state=False,
    use_qk_l2norm_in_kernel=False,
    **others,
):
    """For `torch_recurrent_gated_delta_rule` and `recurrent_kimi_delta_attention`.
    A cached state of the right dtype is updated in place."""
    refuse_others(others)
    if initial_state is None:
        return chunk_delta_rule(
            query,
            key,
            value,
            g,
            beta,
            output_final_state=output_final_state,
            use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
        )
    state = _state(initial_state, query, value)
    settings = {"decay": g, "scale": query.shape[-1] ** -0.5, "l2_norm": use_qk_l2norm_in_kernel}
    output = delta_rule_step(query, key, value, beta, state, **settings)
    return output, state if output_final_state else None


def _state(state, query, value):
    """A cached state in the dtype of the kernels."""
    check_state("recurrent state", state, [query.shape[0], value.shape[2], query.shape[3], value.shape[3]])
    return state.to(state_dtype(query))
