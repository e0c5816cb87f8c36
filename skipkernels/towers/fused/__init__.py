"""A pre-norm transformer block as one autograd node that saves little for backward.

    hidden = stream + branch
    mid = hidden + attention(LN₁(hidden)) · W_o + b_o
    out = mid + act(LN₂(mid) · W_fc + b_fc) · W_p + b_p

Input and output are sums that the next norm computes: a `Hidden` with a stream and a branch. The stream of the output
is mid, and its branch the MLP's result. A sum has one gradient, which backward takes and returns once for each term: in
the dtype of the stream, and in that of the branch.

Options, as some families have them: a norm of each head of query and key (`query_norm`, `key_norm`), rotary position
embeddings of query and key (`Rotary`), a norm of the result of attention and one of the activation (`attention_norm`,
`mlp_norm`), SwiGLU, where W_fc has gate and value side by side, RMSNorm in place of LayerNorm, and no biases.

    node.py        `fused_block`, by a `torch.autograd.Function`; imported by the first block that runs
    stages.py      norm_1 → in_proj → attention → out_proj → norm_2 → mlp, forward and backward, and what each saves
    weights.py     weights and settings of a block, as a family reads them and as the stages do
    gradients.py   gradients of the weights

`..rows` has what a tower passes to a block.
"""
