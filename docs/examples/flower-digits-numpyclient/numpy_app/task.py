"""The model, the data and the loops of the app: softmax regression."""

from functools import cache

import numpy as np
from sklearn.datasets import load_digits


def initial_weights():
    return [np.zeros((64, 10), np.float32), np.zeros(10, np.float32)]


@cache
def digits():
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(images))
    return (images[order] / 16).astype(np.float32), labels[order]


def load_data(partition_id, num_partitions):
    """One partition's train and test rows."""
    x, y = (part[partition_id::num_partitions] for part in digits())
    cut = int(0.8 * len(x))
    return (x[:cut], y[:cut]), (x[cut:], y[cut:])


def probabilities(weights, x):
    logits = x @ weights[0] + weights[1]
    raised = np.exp(logits - logits.max(axis=1, keepdims=True))
    return raised / raised.sum(axis=1, keepdims=True)


def train(weights, rows, epochs, lr, batch_size, seed):
    """The weights after SGD on the cross-entropy."""
    x, y = rows
    w, b = (each.copy() for each in weights)
    rng = np.random.default_rng(seed)
    for _ in range(epochs):
        order = rng.permutation(len(x))
        for start in range(0, len(x), batch_size):
            batch = order[start : start + batch_size]
            slope = (
                probabilities([w, b], x[batch]) - np.eye(10, dtype=np.float32)[y[batch]]
            ) / len(batch)
            w -= lr * (x[batch].T @ slope)
            b -= lr * slope.sum(axis=0)
    return [w, b]


def test(weights, rows):
    """Mean loss and accuracy."""
    x, y = rows
    found = probabilities(weights, x)
    loss = -np.log(found[np.arange(len(y)), y] + 1e-12).mean()
    return float(loss), float((found.argmax(axis=1) == y).mean())
