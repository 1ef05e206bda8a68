"""Averaging: sites send their updates, the server optimiser steps along the mean.

FedAvg: McMahan et al. 2017 (arXiv:1602.05629), algorithm 1. With `proximal_mu` it is FedProx (Li et al. 2020,
arXiv:1812.06127, algorithm 2), with another server optimiser FedAvgM, FedAdam, FedYogi or FedAdagrad.
"""

from fedcore.learning.rules.parts import Rules, optimised, plain_train

RULES = Rules(
    train=plain_train,
    init=lambda plan: {},
    apply=lambda plan, state, mean, summed: optimised(plan, state, mean),
    largest_step=lambda plan, step, mean: step,
)
