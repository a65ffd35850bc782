"""Fitting of the n-gram guard: logistic regression for the prompt, then for the response."""

import random
import re
import zlib
from typing import Any

import numpy as np
import numpy.typing as npt
from guard_data import Row
from guard_rows import calibrate, certainty, cross_entropy, label_at, row_weights
from scipy import optimize, sparse
from scipy.special import expit

from ballast.guardrails.ngram import PROMPT_BUCKETS, RESPONSE_BUCKETS, WORD_BUCKETS, NgramModel, hash_text
from ballast.models import embedded_model

OWN_PROMPT_WEIGHT = 15.0  # shipped and composed requests are few, and the ones that matter most
EMBEDDING_SCALE = 10.0  # how cheap a word's embedding is beside its n-grams


def fit_ngram(rows: list[Row], prompts: list[tuple[str, bool]], seed: int) -> tuple[NgramModel, dict[str, Any]]:
    """Logistic regression for the prompt, then one for the response, scaled by the prompt's; calibrated on dev."""
    weights, harm = _fit_prompts(rows, prompts, seed)
    fit, dev = (_positions([row for row in rows if row.part == part], harm, seed) for part in ("fit", "dev"))
    tried, best = [], None
    for penalty in (1e-5, 3e-5, 1e-4):
        w = logistic(fit[0], fit[1], fit[2], penalty)
        loss = cross_entropy(dev[0] @ w[:-1] + w[-1], dev[1], dev[2])
        tried.append({"penalty": penalty, "dev_loss": round(loss, 4)})
        print(tried[-1], flush=True)
        if best is None or loss < best[0]:
            best = (loss, w, penalty)
    assert best is not None
    w = best[1]
    slope, offset = calibrate(dev[0] @ w[:-1] + w[-1], dev[1], dev[2])
    weights |= {
        "response": w[:RESPONSE_BUCKETS], "product": w[RESPONSE_BUCKETS : 2 * RESPONSE_BUCKETS], "harm": w[-2:-1], "bias": w[-1:],
        "slope": np.array([slope]), "offset": np.array([offset]),
    }  # fmt: skip
    return NgramModel(weights), {"penalty": best[2], "tried": tried}


def _fit_prompts(
    rows: list[Row], prompts: list[tuple[str, bool]], seed: int
) -> tuple[dict[str, npt.NDArray[np.float64]], dict[str, float]]:
    """Weights of the prompt model, and its out-of-fold score of every prompt (its own would be too sure)."""
    known = dict(prompts) | {row.prompt: row.harmful for row in rows if row.harmful is not None}
    own = {row.prompt for row in rows if "shipped" in row.group or "composed" in row.group}
    texts = sorted({*known, *(row.prompt for row in rows)})
    vocabulary, table = word_embeddings(texts)
    means = np.array(
        [
            table[[vocabulary[word] for word in words(text)]].mean(0) if words(text) else np.zeros(table.shape[1])
            for text in texts
        ]
    )
    grams = _matrix([hash_text(text).vector(len(text), PROMPT_BUCKETS) for text in texts], PROMPT_BUCKETS)
    X = sparse.hstack([grams, sparse.csr_matrix(means * EMBEDDING_SCALE)], format="csr")
    y = np.array([float(known.get(text, False)) for text in texts])
    weight = np.array([0.0 if text not in known else OWN_PROMPT_WEIGHT if text in own else 1.0 for text in texts])
    weight *= np.where(y > 0, 1 / (weight @ y), 1 / (weight @ (1 - y)))  # harmful and harmless weigh the same
    fold, score = np.random.default_rng(seed).integers(0, 4, len(texts)), np.zeros(len(texts))
    for number in range(4):
        w = logistic(X[fold != number], y[fold != number], weight[fold != number], 1e-4)
        score[fold == number] = expit(X[fold == number] @ w[:-1] + w[-1])
    w = logistic(X, y, weight, 1e-4)
    mine = np.array([text in own for text in texts])
    print(
        f"prompt model: out of fold, {np.mean((score[mine] > 0.5) == (y[mine] > 0.5)):.3f} of {mine.sum()} own prompts are right",
        flush=True,
    )
    lookup = np.zeros(WORD_BUCKETS)
    for word, index in vocabulary.items():
        lookup[zlib.crc32(word.encode()) % WORD_BUCKETS] = table[index] @ w[PROMPT_BUCKETS:-1] * EMBEDDING_SCALE
    return {"prompt": w[:PROMPT_BUCKETS], "words": lookup, "prompt_bias": w[-1:]}, dict(
        zip(texts, score.tolist(), strict=True)
    )


def words(text: str) -> list[str]:
    """Words of a text as `ballast.guardrails.ngram.word_buckets` sees them."""
    return [word.lower() for word in re.findall(r"\w+(?:['’]\w+)*", text) if word[0].isalnum()]


def word_embeddings(texts: list[str]) -> tuple[dict[str, int], npt.NDArray[np.float64]]:
    """Static embeddings (V, D), centred and of length 1 a token, of the texts' words and of every whole-word token."""
    from safetensors import safe_open
    from transformers import AutoTokenizer

    folder = embedded_model()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with safe_open(folder / "model.safetensors", "pt") as file:
        tokens = file.get_tensor("model.embed_tokens.weight").double().numpy()
    tokens -= tokens.mean(0)
    tokens /= np.linalg.norm(tokens, axis=1, keepdims=True) + 1e-6
    whole = [token[1:].lower() for token in tokenizer.get_vocab() if re.fullmatch("Ġ[A-Za-z]{2,}", token)]
    vocabulary = sorted({*whole, *(word for text in texts for word in words(text))})
    ids = tokenizer([" " + word for word in vocabulary], add_special_tokens=False)["input_ids"]
    return {word: number for number, word in enumerate(vocabulary)}, np.array([tokens[part].mean(0) for part in ids])


def _positions(
    rows: list[Row], harm: dict[str, float], seed: int
) -> tuple[sparse.csr_matrix, npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    rng, weights = random.Random(seed), row_weights(rows)
    vectors, scores, labels, sizes = [], [], [], []
    for row, weight in zip(rows, weights, strict=True):
        hashed, length = hash_text(row.response), len(row.response)
        for cut in {length, rng.randint(0, length), rng.randint(0, length)}:
            vectors.append(hashed.vector(cut, RESPONSE_BUCKETS))
            scores.append(harm[row.prompt])
            labels.append(label_at(row, cut))
            sizes.append(weight * certainty(row, cut))
    R, s = _matrix(vectors, RESPONSE_BUCKETS), np.array(scores)
    return (
        sparse.hstack([R, sparse.diags(s) @ R, sparse.csr_matrix(s[:, None])], format="csr"),
        np.array(labels),
        np.array(sizes),
    )


def _matrix(vectors: list[tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]], size: int) -> sparse.csr_matrix:
    starts = np.cumsum([0, *(len(index) for index, _ in vectors)])
    return sparse.csr_matrix(
        (np.concatenate([v for _, v in vectors]), np.concatenate([i for i, _ in vectors]), starts), (len(vectors), size)
    )


def logistic(
    X: sparse.csr_matrix, y: npt.NDArray[np.float64], weight: npt.NDArray[np.float64], penalty: float
) -> npt.NDArray[np.float64]:
    """Weights and, last, bias that minimise weighted cross-entropy + penalty / 2 * |w|^2, by L-BFGS."""
    weight = weight / weight.sum()
    transposed = X.T.tocsr()

    def objective(w: npt.NDArray[np.float64]) -> tuple[float, npt.NDArray[np.float64]]:
        logit = X @ w[:-1] + w[-1]
        error = weight * (expit(logit) - y)
        loss = float(weight @ (np.logaddexp(0, logit) - y * logit)) + penalty / 2 * float(w[:-1] @ w[:-1])
        return loss, np.append(transposed @ error + penalty * w[:-1], error.sum())

    return optimize.minimize(
        objective, np.zeros(X.shape[1] + 1), jac=True, method="L-BFGS-B", options={"maxiter": 200}
    ).x
