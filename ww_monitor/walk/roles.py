"""The role of a weight matrix, read off the names that common model families give their layers."""

from __future__ import annotations

import re

from ww_monitor.kind import Kind

_IN_ATTENTION = r"\w*att\w*\.(\w+\.)?"  # attn.  self_attention.  SelfAttention.  attention.self.
_IN_MLP = r"(\w*mlp|feed_forward|DenseReluDense|layers\.\d+|experts\.\d+)\."

_ROLES = (  # (end of the name, role); the first match wins, so an attention's output stands before "output.dense"
    (r"attn\.c_attn|qkv(_proj)?|query_key_value|Wqkv", "qkv"),
    (rf"q_proj|q_lin|q_attn|{_IN_ATTENTION}(q|query|wq)", "q"),
    (rf"k_proj|k_lin|{_IN_ATTENTION}(k|key|wk)", "k"),
    (rf"v_proj|v_lin|{_IN_ATTENTION}(v|value|wv)", "v"),
    (rf"o_proj|out_proj|out_lin|{_IN_ATTENTION}(o|wo|c_proj|dense)", "o"),
    (rf"gate_proj|{_IN_MLP}w1", "gate"),
    (rf"up_proj|{_IN_MLP}(c_fc|fc1|fc_in|linear1|wi|w3|dense_h_to_4h)|ffn\.lin1|intermediate\.dense", "up"),
    (rf"down_proj|{_IN_MLP}(c_proj|fc2|fc_out|linear2|wo|w2|dense_4h_to_h)|ffn\.lin2|output\.dense", "down"),
    (r"embed_tokens|wte|wpe|\w+_embeddings?|embeddings?", "embed"),
    (r"lm_head|embed_out|heads?|classifier|score|predictions\.decoder", "head"),
)
_PATTERNS = tuple((re.compile(rf"(^|.*\.)({ending})", re.IGNORECASE), role) for ending, role in _ROLES)


def infer_role(name: str, kind: Kind) -> str:
    """What the matrix does in its block, or `""` if the name does not tell.

    Args:
        name: Cleaned dotted name of the matrix.
        kind: Kind of the matrix; it decides alone where every matrix of the kind has one role.

    Returns:
        `"q"`, `"k"`, `"v"`, `"o"`, `"qkv"`, `"up"`, `"gate"`, `"down"`, `"embed"`, `"head"`, `"conv"` or `""`.
        The names known are those of GPT-2, Llama, BERT, T5, OPT, BLOOM and `torch.nn.Transformer`.

    >>> infer_role("transformer.h.0.attn.c_proj", Kind.DENSE), infer_role("transformer.h.0.mlp.c_proj", Kind.DENSE)
    ('o', 'down')
    """
    if kind.about.role is not None:
        return kind.about.role
    if kind is Kind.ATTENTION:
        name = f"attention.{name.rpartition('.')[2]}"
    return next((role for pattern, role in _PATTERNS if pattern.fullmatch(name)), "")
