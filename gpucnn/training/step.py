"""A whole step of training as one CUDA graph, or the same step in plain calls."""
from __future__ import annotations

import traceback
import warnings
from collections.abc import Callable, Hashable, Iterator
from functools import partial
from typing import Any

from gpucnn.backend import Array
from gpucnn.data import Loader
from gpucnn.data.feed import Feed
from gpucnn.geometry import is_int
from gpucnn.layers import Layer
from gpucnn.layers.base import argument_names
from gpucnn.optim import Optimizer
from gpucnn.schedules import Schedule
from gpucnn.training import memory
from gpucnn.training.average import Average
from gpucnn.training.plain import (
    Loss,
    check_loss_scales,
    gradients,
    receive,
    receive_targets,
    update,
)
from gpucnn.training.results import ResultLog, StepResult

Passes = Callable[[Array, Any], tuple[Array, Array]]  # forward and backward, as gradients()
READ_EVERY = 32  # steps, whose results go to the host in one copy


class TrainStep:
    """One step of training: forward, backward and update. Calls do not wait for the GPU.

        step = TrainStep(model, loss, optimizer)
        for result in step.epoch(loader, number):   # all batches of a Loader, or
            ...
        step(x, t)                                  # a batch of one's own
        results = step.results()

    On a GPU the first step with batches of some shape is made of plain calls, which compile what is
    not compiled yet. The second one is captured into a CUDA graph, with memory of its own, and all
    that follow are one launch each. The bits are the same. The last, short batch of an epoch has
    a graph of its own. So has a step after a setting of the model, loss or optimizer was changed,
    other than the learning rate, which lies on the device; arrays among the settings are to be
    written to, not replaced. On the CPU all steps are plain calls.

    capture: whether to make graphs.
    read_every: after how many steps their results are copied to the host, while the GPU goes on.
    micro_batches: in how many parts a batch of n images goes through the model, one after the
        other, each of ceil(n / micro_batches) images but for a shorter last one; where n is small
        they are fewer. Their losses and gradients are summed with the weights m / n, and one update
        follows: the step of the whole batch, up to rounding, in the memory of a part, the batch
        and one more array of gradients. But the statistics of a batch norm in training are those
        of a part, which needs more than one value a channel, and a dropout draws, and counts, once
        a part: each has another mask. May be changed between steps.
    average: of the parameters, brought up to date after each update.
    auto_batch: where a first step with batches of some shape runs out of memory in the forward or
        backward passes, make it again from the start with twice as many micro-batches, until there
        is enough; a RuntimeWarning says so. It stays at that number: `micro_batches`. From that
        step on the bits are those of a TrainStep that was given it.

    Without auto_batch, or where micro-batches of one image are too large, a BackendError says in
    which layer memory ran out. Model, optimizer and TrainStep can be used again then.

    What cannot be captured (a loss or an optimizer of one's own that looks at values on the host)
    runs in plain calls: a RuntimeWarning says so once, and `not_captured` holds the reason.

    Raises RuntimeError for a model that is not built, TypeError and ValueError for arguments, and
    for an optimizer of another model or with another loss scale than the loss.
    """

    def __init__(self, model: Layer, loss: Loss, optimizer: Optimizer, *, capture: bool = True,
                 read_every: int = READ_EVERY, micro_batches: int = 1,
                 average: Average | None = None, auto_batch: bool = False):
        for fits, wanted, got in (
                (isinstance(model, Layer), "model must be a layers.Layer", model),
                (callable(loss), "loss must be one of gpucnn.losses or a function", loss),
                (isinstance(optimizer, Optimizer), "optimizer must be an optim.Optimizer",
                 optimizer),
                (isinstance(average, (Average, type(None))), "average must be a "
                 "training.Average or None", average)):
            if not fits:
                raise TypeError(f"TrainStep: {wanted}, got {got!r}")
        if not model.built:
            raise RuntimeError("TrainStep needs a built model; call model.build(input_shape)")
        for part, name in ((optimizer, "optimizer"), (average, "average")):
            if part is not None and part.model is not model:
                raise ValueError(f"TrainStep: the {name} is that of another model")
        for name, flag in (("capture", capture), ("auto_batch", auto_batch)):
            if not isinstance(flag, bool):
                raise TypeError(f"TrainStep: {name} must be True or False, got {flag!r}")
        for name, value in (("read_every", read_every), ("micro_batches", micro_batches)):
            if not is_int(value) or value < 1:
                raise ValueError(f"TrainStep: {name} must be an int >= 1, got {value!r}")
        check_loss_scales(loss, optimizer)
        self.model, self._loss, self.optimizer, self.average = model, loss, optimizer, average
        self.backend = model.backend
        self.capture = capture and self.backend.captures
        self.micro_batches, self.auto_batch = int(micro_batches), auto_batch
        self.not_captured: str | None = None
        self._log = ResultLog(self.backend, int(read_every))
        self._memory = self.backend.graph_memory()
        self._plain: set[Hashable] = set()  # what has run once
        self._graphs: dict[Hashable, Callable[[], None]] = {}
        self._parameters: Array = None  # that the graphs write
        self._watched: list[tuple[dict[str, Any], str]] = []
        self._inputs: dict[Hashable, tuple[Array, Array]] = {}
        self._feeds: dict[Loader, Feed] = {}
        self._turn: object = None  # of the epoch that has begun last

    def __call__(self, x: Any, t: Any) -> None:
        """A step on one batch, as train_step takes it. Its result comes with results().

        With graphs the batch is copied, unless it is that of inputs().
        """
        model = self.model
        x = receive(model, x)
        if not self.capture:
            return self._run((x.shape, x.dtype), lambda: (x, t), len(x))
        t = receive_targets(model, self._loss, t, len(x))
        key = x.shape, x.dtype, t.shape, t.dtype
        given = self._inputs.get(key, (None, None))
        if x is not given[0] or t is not given[1]:
            given = self.inputs(x, t)
        return self._run(key, lambda: given, len(x))

    def inputs(self, x: Any, t: Any) -> tuple[Array, Array]:
        """The arrays that the steps of batches like (x, t) read, with x and t copied into them.

        A step on these two copies nothing: write the next batch into them.
        """
        x = receive(self.model, x)
        t = receive_targets(self.model, self._loss, t, len(x))
        key = x.shape, x.dtype, t.shape, t.dtype
        if key not in self._inputs:
            empty = self.backend.xp.empty
            self._inputs[key] = empty(x.shape, x.dtype), empty(t.shape, t.dtype)
        for array, new in zip(self._inputs[key], (x, t)):
            array[...] = new
        return self._inputs[key]

    def epoch(self, loader: Loader, number: int = 0, position: int = 0, *,
              schedule: Schedule | None = None) -> Iterator[StepResult]:
        """A step on each batch of an epoch of the loader, as Loader.epoch() counts them.

        schedule: sets the optimizer's learning rate before each step, by the number of the steps
            before it in this epoch and those before it (gpucnn.schedules).

        Yields the result of each step in order: at once on the CPU, up to 2 * read_every steps
        later on a GPU. The epoch begins when the first one is asked for, so that epochs can be
        chained. Results that nobody has asked for are forgotten then.

        Raises TypeError for what is no Loader, ValueError for one on another backend, what
        Loader.epoch() raises, and RuntimeError where it is to go on after another epoch has begun.
        """
        if not isinstance(loader, Loader):
            raise TypeError(f"TrainStep: epoch() takes a data.Loader, got {loader!r}; for batches "
                            "from elsewhere call the step itself")
        if loader.backend is not self.backend:
            raise ValueError(f"TrainStep: the loader is on {loader.backend.name}, the model on "
                             f"{self.backend.name}; make both in one use_backend() block")
        if loader not in self._feeds:
            self._feeds[loader] = loader.feed()
        loader.check_epoch(number)
        loader.sizes(position)
        return self._epoch(loader, number, position, schedule)

    def _epoch(self, loader: Loader, number: int, position: int, schedule: Schedule | None
               ) -> Iterator[StepResult]:
        self.results()
        turn, feed = object(), self._feeds[loader]
        self._turn = turn
        first = number * len(loader) + position // loader.batch_size
        for before, size in enumerate(feed.begin(number, position), first):
            if self._turn is not turn:
                raise RuntimeError("TrainStep: another epoch has begun; only that one can go on")
            if schedule is not None:
                self.optimizer.learning_rate = schedule(before)
            feed.advance(size)
            self._run((loader, size), partial(feed.gather, size), size)
            yield from self._log.arrived()
        self._log.wait()
        yield from self._log.arrived()

    def results(self) -> list[StepResult]:
        """Those of all steps since they were last asked for, in order. Waits for the GPU."""
        self._log.wait()
        return list(self._log.arrived())

    def _run(self, key: tuple, batch: Callable[[], tuple[Array, Array]], images: int) -> None:
        """One step on what batch() gives, as a graph once it ran as it is."""
        if self.model.flat_data is not self._parameters:  # the first step since it was built
            self._parameters = self.model.flat_data
            self._graphs.clear()
            self._plain.clear()
            self._watched = list(self._settings())

        check_loss_scales(self._loss, self.optimizer)
        if self.average is not None and self.average.is_applied:
            raise RuntimeError("TrainStep: a step inside average.applied() would be undone when "
                               "that block ends; end it first")
        self._log.turn_over()

        # Without self: the graphs, which keep it, go with the last of self.
        step = partial(_step, batch, self.optimizer, self.average, self._log)
        values = self._values()
        key, whole = (*key, *values), (*key, *values, self.micro_batches)
        ran = whole in self._plain
        if ran and whole not in self._graphs and self.capture and not self.not_captured:
            self._capture(whole, partial(step, self._passes()))
        if whole in self._graphs:
            self._graphs[whole]()
        else:
            self._in_plain_calls(step, images, ran)
            self._plain.add((*key, self.micro_batches))  # an error would have ended it
        self._log.wrote(images)

    def _passes(self) -> Passes:
        return partial(gradients, self.model, self._loss, micro_batches=self.micro_batches)

    def _in_plain_calls(self, step: Callable[[Passes], None], images: int, ran: bool) -> None:
        """ran: whether one like it was made before, and had memory enough."""
        try:
            step(self._passes_that_fit if self.auto_batch and not ran else self._passes())
        except MemoryError as e:
            micro_batch = self._micro_batch(images)
            remedy = memory.SMALLER_NETWORK if micro_batch == 1 else \
                f"try --batch-size {images // 2}{'' if self.auto_batch else ' or --auto-batch'}"
            raise memory.explain(e, self.model, self._parts(), images, micro_batch,
                                 remedy) from e

    def _passes_that_fit(self, x: Array, t: Any) -> tuple[Array, Array]:
        """gradients(), from the start again in smaller micro-batches while memory runs out."""
        model, first, reason = self.model, self.micro_batches, ""
        state = [layer.own_buffers[name] for layer, name in model.buffers().values()]
        state += model.counters().values()
        before = [a.copy() for a in state]
        while True:
            try:
                found = self._passes()(x, t)
                break
            except MemoryError as e:
                for array, content in zip(state, before):
                    array[...] = content
                if self._micro_batch(len(x)) == 1 and not self._graphs:
                    raise
                reason = reason or memory.describe(e, model, self._parts(), len(x))
                memory.release(e, model)
            if self._graphs:
                self._drop_graphs()
            else:
                self.micro_batches *= 2
            self.backend.free_unused()
        if reason and self.micro_batches > first:
            warnings.warn(f"{reason}; going on with micro-batches of {self._micro_batch(len(x))}",
                          RuntimeWarning, stacklevel=6)
        return found

    def _micro_batch(self, images: int) -> int:
        """How many images the parts of such a batch have."""
        return -(-images // self.micro_batches)

    def _parts(self) -> tuple[Any, ...]:
        return self._loss, self.optimizer, self.optimizer.loss_scale, self.average

    def _drop_graphs(self) -> None:
        self._graphs.clear()
        self._memory = self.backend.graph_memory()

    def _values(self) -> tuple:
        """Of the settings, to look up graphs by. Of one that is no number or name any more, such
        as an array, only the type counts."""
        values = tuple(settings[name] for settings, name in self._watched)
        if _hashable(values):
            return values
        return tuple(value if _hashable(value) else type(value) for value in values)

    def _capture(self, key: Hashable, work: Callable[[], None]) -> None:
        try:
            self._graphs[key] = self.backend.capture(work, self._memory)
        except Exception as e:
            self.not_captured = _reason(e)
            self.model.forget()
            self._graphs.clear()  # the plain calls may need their memory, above all if it is short
            self._memory = None
            warnings.warn("this training step cannot be captured into a CUDA graph and runs in "
                          f"plain calls: {self.not_captured}; capture=False leaves out the attempt",
                          RuntimeWarning, stacklevel=5)

    def _settings(self) -> Iterator[tuple[dict[str, Any], str]]:
        """The numbers and names that a graph holds and that can be changed between steps."""
        named = [(vars(p), list(vars(p))) for p in self._parts() if hasattr(p, "__dict__")]
        named += [(vars(layer), argument_names(type(layer))) for layer in self.model.walk()]
        for settings, names in named:
            for name in names:
                if name[0] != "_" and _hashable(settings.get(name)):
                    yield settings, name
        if type(self.optimizer).step is not Optimizer.step:  # one that may read it on the host
            yield vars(self.optimizer), "_learning_rate"


def _step(batch: Callable[[], tuple[Array, Any]], optimizer: Optimizer, average: Average | None,
          log: ResultLog, passes: Passes) -> None:
    value, hits = passes(*batch())
    update(optimizer, average, value)
    log.record(value, hits)


def _hashable(value: Any) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True


def _reason(e: Exception) -> str:
    """What was said against it, and which line of whose code met it."""
    frames = [frame for frame in traceback.extract_tb(e.__traceback__)
              if "cupy" not in frame.filename.replace("\\", "/").split("/")[-3:]]
    place = f" ({frames[-1].filename.rsplit('/', 1)[-1]}, line {frames[-1].lineno})"
    return f"{type(e).__name__}: {' '.join(str(e).split())}{place}"
