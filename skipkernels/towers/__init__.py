"""Image and text towers of a CLIP model, cut below block `skip`.

    base.py               running the blocks below and above the cut
    image.py, text.py     the two towers: embedding, blocks, head
    prompts.py            prompts as rows of packed tokens
    rows.py               rows of tokens, and attention over them, as a tower passes both to its blocks
    block.py              a fused block, which takes rows; fused_classes.py makes its class, fuse.py is `sk.fuse`
    fused/                forward and backward of a fused block
    families/             one file per model family; registry.py chooses by the types of modules
    alterations.py        why a block cannot be fused; comparison.py compares one with its own forward
    low_rank.py           the update of a weight by LoRA
    xformers.py           xformers in place of PyTorch's attention
    watch.py              changes of modules and weights; modes.py sets training and evaluation mode
    reductions.py         which exact reductions are enabled

A tower calls the caller's modules, and holds no parameters.
"""
