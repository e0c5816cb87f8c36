"""A pre-norm transformer block as one autograd node that saves little for backward.

    hidden = stream + branch of the previous block
    mid = hidden + attention(LN₁(hidden)) · W_o + b_o
    branch = act(LN₂(mid) · W_fc + b_fc) · W_p + b_p

The result is the sum of mid and branch, returned as `Hidden`, so that the norm of the next block adds them.

Options, as some families have them: a norm of each head of query and key (`query_norm`, `key_norm`), rotary position
embeddings of query and key (`Rotary`), a norm of the result of attention and one of the activation (`attention_norm`,
`mlp_norm`), SwiGLU, where W_fc has gate and value side by side, RMSNorm in place of LayerNorm, and no biases.

    records.py    hidden states, weights and settings of a block, a call of it, and what that saves
    node.py       `fused_block`, by a `torch.autograd.Function`; imported by the first block that runs
    stages.py     norm_1 → in_proj → attention → out_proj → norm_2 → mlp, each with its backward, and what each saves
    gradients.py  gradients of the weights, as products and as sums over rows
"""
