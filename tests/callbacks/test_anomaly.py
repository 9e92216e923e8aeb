"""Debugging: a gradient that is not a number is an error that names the operation."""

import pytest
import torch

from callbacks.anomaly import DetectAnomaly


def test_a_nan_in_a_backward_pass_is_an_error_while_a_stage_trains():
    callback, x = DetectAnomaly(), torch.zeros(1, requires_grad=True)
    callback.on_train_start(None, None)
    try:
        with pytest.warns(UserWarning, match="Error detected in SqrtBackward0"):
            with pytest.raises(RuntimeError, match="SqrtBackward0.*nan"):
                (torch.sqrt(x) * 0).sum().backward()
    finally:
        callback.teardown(None, None, "fit")
    (torch.sqrt(x) * 0).sum().backward()
    assert x.grad.isnan().all() and not torch.is_anomaly_enabled()


def test_a_stage_that_fails_before_training_leaves_the_mode_off():
    DetectAnomaly().teardown(None, None, "fit")
    assert not torch.is_anomaly_enabled()
