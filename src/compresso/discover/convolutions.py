"""What the operations of pictures do to classes: convolutions, batch norms and changes of size.

A convolution contracts channels. One of each channel by itself, like a batch norm, scales and shifts what it reads; a
resampling leaves channels where they are.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from compresso.discover.labels import Place, Value, Weight, along, refuse, spread
from compresso.discover.meetings import Meetings
from compresso.discover.trace import Ref, Step


class Convolutions(Meetings):
    """The rules of feature maps: channels along their second dimension."""

    def _convolution(self, step: Step, place: Place) -> Value:
        """A convolution without groups: input channels join, output channels are written, kernel positions stay. One of
        each channel by itself scales and shifts what it reads.
        """
        x, weight = self.values.get(step.inputs[0]), self.values.get(step.inputs[1])
        transposed, groups, each = step.args[6], step.args[8], self._of_each_channel(step)
        if not isinstance(weight, Weight) or transposed or (groups != 1 and not each):
            raise refuse(place, "is a convolution with groups, transposed, or without a weight of its own")
        if each and isinstance(x, Tensor):
            for classes in weight.classes[2:]:
                self.classes.pin(classes, place, "it is a kernel position")
            return self._by_channel(x, step.inputs[1:], self.trace.shapes[step.outputs[0]])
        for classes in weight.classes[2:]:
            self.classes.pin(classes, place, "it is a kernel position")
        for dim, notes in ((1, self.classes.reads), (0, self.classes.writes)):
            if (source := weight.sources[dim]) is not None:
                notes.setdefault(source, place)
        if not isinstance(x, Tensor):
            self.classes.pin(weight.classes[1], place, "it reads an input of fixed size")
        else:
            read = spread(weight.classes[1], 1, tuple(x.shape))
            self.classes.join(x, read)
            self.classes.pin(torch.where(x == 0, read, 0), place, "it reads an input of fixed size")
        out = spread(weight.classes[0], 1, self.trace.shapes[step.outputs[0]])
        if isinstance(step.args[2], Ref) and isinstance(bias := self.values.get(step.args[2].number), Weight):
            self.classes.join(bias.classes[0], weight.classes[0])
            self._note_bias(bias, place)
        return out

    def _of_each_channel(self, step: Step) -> bool:
        """Whether a convolution reads one channel for each that it writes, and is not transposed."""
        shape, groups = self.trace.shapes[step.inputs[1]], step.args[8]
        return not step.args[6] and groups == shape[0] > 1 and shape[1] == 1

    def _by_channel(self, x: Tensor, numbers: Sequence[int], shape: tuple[int, ...]) -> Tensor:
        """What is done to each channel of feature maps by parameters with an entry for each: they leave together."""
        channels = along(x, 1)
        for number in numbers:
            if isinstance(weight := self.values.get(number), Weight):
                self.classes.join(channels, weight.classes[0])
        return spread(channels, 1, shape)

    def _batch_norm(self, step: Step, place: Place) -> Value:
        """A batch norm of a model that is asked: its statistics are constants with an entry for each channel."""
        x = self._entries(step.inputs[0], place)
        return self._by_channel(x, step.inputs[1:], self.trace.shapes[step.outputs[0]])

    def _resampled(self, step: Step, place: Place) -> Value:
        """Feature maps in another size: channels stay apart, places mix."""
        x = self._entries(step.inputs[0], place)
        for dim in (2, 3):
            x = self._normalised(x, dim, place, "is mixed with its neighbours")
        return spread(along(x, 1), 1, self.trace.shapes[step.outputs[0]])
