"""The model and the data of the app: logistic regression."""

import warnings
from functools import cache

import numpy as np
from sklearn.datasets import load_digits
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression


@cache
def digits():
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(images))
    return images[order] / 16, labels[order]


def load_data(partition_id, num_partitions):
    """One partition's train and test rows."""
    x, y = (part[partition_id::num_partitions] for part in digits())
    cut = int(0.8 * len(x))
    return x[:cut], x[cut:], y[:cut], y[cut:]


def new_model(penalty, iterations):
    """A model of zeros; L-BFGS goes on from the weights that it is given."""
    model = LogisticRegression(C=1 / penalty, max_iter=iterations, warm_start=True)
    model.classes_ = np.arange(10)
    set_weights(model, [np.zeros((10, 64)), np.zeros(10)])
    return model


def get_weights(model):
    return [model.coef_, model.intercept_]


def set_weights(model, weights):
    model.coef_, model.intercept_ = weights


def fit(model, x, y):
    with warnings.catch_warnings():  # a few iterations a round do not converge
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(x, y)
