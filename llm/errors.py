"""The one exception type for mistakes a user can make and mend."""


class UserError(ValueError):
    """A wrong config value, file or combination. The text names the key or file, the value and the fix.

    Entry points print it as one `error: ...` line without a traceback and exit with status 2.
    """


class BadData(UserError):
    """Raised for data that cannot be read on: a bad row, or a damaged file. Training saves its last step before."""


class BadLoss(UserError):
    """A training step whose loss is not finite or far above the last ones, raised before it changes the weights.

    step: the one that failed, counted from 1. finite: whether its loss is; then the steps before may be at fault.
    documents: ids (B, T) of the micro-batch that did it, None where it is another process's or unknown.
    """

    def __init__(self, step: int, problem: str, finite: bool, documents=None):
        super().__init__(
            f"{problem}: lower the learning rate (stage.lr_frac) and start again with overwrite=true or "
            "run=<new name>, or let it leave out such data (watch.bad_loss=roll_back)"
        )
        self.step, self.problem, self.finite, self.documents = step, problem, finite, documents
