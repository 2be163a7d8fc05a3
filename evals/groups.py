"""Which predictions are alike? By position, by count in the training text, by class of token.

A piece is a token of letters without a space before it: a part of a word, or a word after "(".
"""

import numpy as np

POSITIONS = (0, 1, 4, 16, 64, 256, 1024, 4096)
COUNTS = (0, 1, 10, 100, 1000, 10_000, 100_000, 1_000_000)
CLASSES = ("word", "piece", "digit", "punctuation", "space", "other")


def token_class(text: str) -> str:
    """One of CLASSES for the text of one token, its leading space included."""
    bare = text.strip()
    if not bare:
        return "space" if text else "other"
    if bare.isdigit():
        return "digit"
    if bare.isalpha():
        return "word" if text[0].isspace() else "piece"
    if bare.isprintable() and "\ufffd" not in bare and not any(map(str.isalnum, bare)):
        return "punctuation"
    return "other"


def classes(tokenizer, special, tokens_SL: np.ndarray) -> np.ndarray:
    """The class of each token, as an index into CLASSES, in the shape of tokens_SL."""
    ids, where = np.unique(tokens_SL, return_inverse=True)
    (anchor,) = tokenizer("a", add_special_tokens=False)["input_ids"][-1:]
    start = len(tokenizer.decode([anchor]))  # a decoder may drop the space of a first token
    texts = tokenizer.batch_decode([[anchor, i] for i in ids])
    of_id = [
        CLASSES.index("other" if i in special else token_class(text[start:]))
        for i, text in zip(ids.tolist(), texts)
    ]
    return np.array(of_id)[where].reshape(tokens_SL.shape)


def ranges(values: np.ndarray, edges) -> dict[str, np.ndarray]:
    """{"4 to 15": mask of values} for each range between edges that holds any."""
    found = {}
    for low, high in zip(edges, (*edges[1:], None)):
        label = f"{low:,}+" if high is None else f"{low:,} to {high - 1:,}"
        label = str(low) if high == low + 1 else label
        mask = (values >= low) & (values < (high or np.inf))
        if mask.any():
            found[label] = mask
    return found


def groups(run, n: int) -> dict[str, dict[str, np.ndarray]]:
    """{grouping: {label: mask_SP}} over the P = CONTEXT - 1 predictions of n sequences."""
    tokens = run.tokens
    all_SL = np.asarray(tokens.val_SL[:n])
    read_SP, predicted_SP = all_SL[:, :-1], all_SL[:, 1:]
    counts_V = np.bincount(np.asarray(tokens.train_SL[np.sort(tokens.order_S)]).ravel())
    counts_V = np.pad(counts_V, (0, max(0, int(all_SL.max()) + 1 - len(counts_V))))
    class_SL = classes(run.tokenizer, tokens.special, all_SL)
    position_SP = np.broadcast_to(np.arange(read_SP.shape[1]), read_SP.shape)
    by_class = {
        name: {label: part == i for i, label in enumerate(CLASSES) if (part == i).any()}
        for name, part in (("predicted", class_SL[:, 1:]), ("read", class_SL[:, :-1]))
    }
    return {
        "all": {"predictions": np.ones_like(read_SP, bool)},
        "position": ranges(position_SP, POSITIONS),
        "count in training text": ranges(counts_V[predicted_SP], COUNTS),
        **by_class,
    }
