"""What products do to classes: a parameter's input dimension joins what it reads, its output dimension is a new writer.

Two activations multiplied (query times key, weights times value) tie all of one batch entry together: a head leaves as
one. An embedding is a product with a table of zeros and ones.
"""

import torch
from torch import Tensor

from compresso.discover.labels import Place, Value, Weight, refuse, spread, varying
from compresso.discover.meetings import Meetings
from compresso.discover.trace import Step


class Products(Meetings):
    """The rules of matrix products and of embeddings."""

    def _product(self, step: Step, place: Place) -> Value:
        """Matrix products, with or without something added."""
        *added, left, right = step.inputs
        a, b = self.values.get(left), self.values.get(right)
        for value in (a, b):
            if isinstance(value, Weight) and len(value.wide) > 2:
                raise refuse(place, "multiplies by a stack of matrices")
        if isinstance(b, Weight) and len(b.classes) == 2:
            out = self._read(a, self.trace.shapes[left], b, place)
        elif isinstance(a, Weight) and len(a.classes) == 2:
            flipped = Weight(a.classes[::-1], a.sources[::-1])
            shape = self.trace.shapes[right]
            turned = self._read(b.transpose(0, 1) if isinstance(b, Tensor) else b, (shape[1], shape[0]), flipped, place)
            assert isinstance(turned, Tensor)
            out = turned.transpose(0, 1)
        else:
            out = self._attend(self._entries(left, place), self._entries(right, place), place)
        if not added:
            return out
        if not isinstance(out, Tensor):
            raise refuse(place, "adds to a product of parameters, or of nothing that is followed")
        return self._with(out, added[0], place)

    def _with(self, out: Tensor, number: int, place: Place) -> Value:
        """A product plus a bias."""
        value = self.values.get(number)
        if isinstance(value, Weight):
            self._meet(out, value, place)
            self._note_bias(value, place)
        elif value is None:
            for dim in varying(out):
                shape = self.trace.shapes[number]
                if dim >= out.ndim - len(shape) and shape[dim - out.ndim + len(shape)] > 1:
                    self.classes.pin(out, place, "it meets a table of fixed size")
        else:
            self.classes.join(out, value.expand(out.shape))
        return out

    def _read(self, a: Value, shape: tuple[int, ...], b: Weight, place: Place) -> Value:
        """`a` (rows, k) times a parameter (k, n): k joins, n is written."""
        for dim, notes in ((0, self.classes.reads), (1, self.classes.writes)):
            if (source := b.sources[dim]) is not None:
                notes.setdefault(source, place)
        if isinstance(a, Weight):
            self.classes.join(a.classes[1], b.classes[0])
            return Weight((a.classes[0], b.classes[1]), (a.sources[0], b.sources[1]))
        if a is None or not bool(a.any()):
            self.classes.pin(b.classes[0], place, "it reads an input of fixed size")
        else:
            read = spread(b.classes[0], 1, shape)
            self.classes.join(a, read)
            self.classes.pin(torch.where(a == 0, read, 0), place, "it reads an input of fixed size")
        return spread(b.classes[1], 1, (shape[0], len(b.classes[1])))

    def _attend(self, a: Tensor, b: Tensor, place: Place) -> Value:
        """Activations times activations: in each batch entry everything leaves together."""
        batched = a.ndim == 3
        if not batched:
            a, b = a[None], b[None]
        if not bool(a.any()) or not bool(b.any()):
            one = a if bool(a.any()) else b
            out = self._normalised(one, 2 if one is a else 1, place, "is multiplied by a fixed table").narrow(
                2 if one is a else 1, 0, 1
            )
            out = out.expand(a.shape[0], a.shape[1], b.shape[2])
            return out if batched else out[0]
        flat = torch.cat([a.reshape(a.shape[0], -1), b.reshape(b.shape[0], -1)], dim=1)
        head = flat.amax(dim=1, keepdim=True)
        self.classes.join(flat, head.expand(flat.shape))
        if bool((flat == 0).any()):
            self.classes.pin(
                torch.where((flat == 0).any(dim=1, keepdim=True), flat, 0),
                place,
                "it is multiplied by entries of fixed size",
            )
        self.classes.attended.append(head.reshape(-1))
        out = head[:, :, None].expand(a.shape[0], a.shape[1], b.shape[2])
        return out if batched else out[0]

    def _lookup(self, step: Step, place: Place) -> Value:
        """An embedding: its columns are written, its rows are looked up."""
        table = self.values.get(step.inputs[0])
        if not isinstance(table, Weight):
            raise refuse(place, "looks up activations")
        self.classes.pin(table.classes[0], place, "its rows are looked up by number")
        if (source := table.sources[1]) is not None:
            self.classes.writes.setdefault(source, place)
        shape = self.trace.shapes[step.outputs[0]]
        return spread(table.classes[1], len(shape) - 1, shape)
