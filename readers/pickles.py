"""Reads pickles of dictionaries of arrays, and runs nothing that a pickle names.

pickletools.genops yields the opcodes and their arguments. Each opcode makes a plain value or a `_Call`. A `_Call`
describes an object by a name, arguments and a state. `as_array` understands the `_Call`s of NumPy arrays of whole
numbers. Other `_Call`s stay as they are.
"""

import math
import pickletools
from typing import Any, NamedTuple

import numpy as np


class _Name(NamedTuple):
    module: str
    name: str


class _Call:
    """Describes an object as a pickle does. Never calls the name. Compares by identity."""

    def __init__(self, name, arguments):
        self.name, self.arguments, self.state = name, arguments, None


_MOST_OPCODES = 1 << 21  # CIFAR-100 takes up to 750,000, depending on the protocol
_MARK = object()
_CORES = ('numpy.core', 'numpy._core')  # in NumPy 1 and NumPy 2
_NUMPY_NAMES = {
    'dtype': {_Name('numpy', 'dtype')},
    'ndarray': {_Name('numpy', 'ndarray')},
    'reconstruct': {_Name(f'{core}.multiarray', '_reconstruct') for core in _CORES},
    'frombuffer': {_Name(f'{core}.numeric', '_frombuffer') for core in _CORES},
}
_ENCODE = _Name('_codecs', 'encode')
_EMPTY_BYTES = {_Name('__builtin__', 'bytes'), _Name('builtins', 'bytes')}
_ADMITTED = {_ENCODE, *_EMPTY_BYTES}.union(*_NUMPY_NAMES.values())

_NEW = {'EMPTY_DICT': dict, 'EMPTY_LIST': list, 'EMPTY_TUPLE': tuple}
_PLAIN = {'NONE': None, 'NEWTRUE': True, 'NEWFALSE': False}
_WITH_ARGUMENT = {
    'INT', 'BININT', 'BININT1', 'BININT2', 'LONG', 'LONG1', 'LONG4',
    'STRING', 'BINSTRING', 'SHORT_BINSTRING', 'BINBYTES', 'SHORT_BINBYTES', 'BINBYTES8', 'BYTEARRAY8',
    'UNICODE', 'BINUNICODE', 'SHORT_BINUNICODE', 'BINUNICODE8',
}  # fmt: skip
_STRINGS = {'STRING', 'BINSTRING', 'SHORT_BINSTRING'}  # Python 2's bytes; genops decodes them as Latin-1


def load(payload: bytes) -> dict[str, Any]:
    """Returns the dictionary in a pickle. Its keys are text, and its values are plain values or `_Call`s.

    Takes a small multiple of the payload's size in memory. A damaged pickle can raise any exception.
    """
    machine = _Machine(len(payload))
    for count, (opcode, argument, _) in enumerate(pickletools.genops(payload)):
        if count == _MOST_OPCODES:
            raise ValueError(f'it has more than {_MOST_OPCODES} opcodes')
        machine.step(opcode.name, argument)
    (result,) = machine.stack
    if type(result) is not dict:
        raise ValueError('it holds no dictionary')
    return result


class _Machine:
    """Runs the opcodes of a pickle on a stack and a memo."""

    def __init__(self, num_bytes):
        self.stack, self.memo, self.bytes_left = [], {}, num_bytes

    def step(self, name, argument):
        push, pop = self.stack.append, self.stack.pop
        if name in _WITH_ARGUMENT:
            push(argument.encode('latin-1') if name in _STRINGS else argument)
        elif name in _PLAIN:
            push(_PLAIN[name])
        elif name in _NEW:
            push(_NEW[name]())
        elif name == 'MARK':
            push(_MARK)
        elif name in ('PUT', 'BINPUT', 'LONG_BINPUT'):
            self.memo[argument] = self.stack[-1]
        elif name == 'MEMOIZE':
            self.memo[len(self.memo)] = self.stack[-1]
        elif name in ('GET', 'BINGET', 'LONG_BINGET'):
            push(self.memo[argument])
        elif name in ('TUPLE1', 'TUPLE2', 'TUPLE3'):
            push(tuple(reversed([pop() for _ in range(int(name[-1]))])))
        elif name in ('TUPLE', 'LIST'):
            push((tuple if name == 'TUPLE' else list)(self.pop_to_mark()))
        elif name == 'DICT':
            push(_set_items({}, self.pop_to_mark()))
        elif name in ('APPEND', 'APPENDS'):
            values = [pop()] if name == 'APPEND' else self.pop_to_mark()
            _of_type(list, self.stack[-1]).extend(values)
        elif name in ('SETITEM', 'SETITEMS'):
            items = [pop(), pop()][::-1] if name == 'SETITEM' else self.pop_to_mark()
            _set_items(_of_type(dict, self.stack[-1]), items)
        elif name in ('GLOBAL', 'STACK_GLOBAL'):
            names = argument.split(' ') if name == 'GLOBAL' else [pop(), pop()][::-1]
            push(_admitted(*names))
        elif name == 'REDUCE':
            arguments, function = pop(), pop()
            push(self.call(_of_type(_Name, function), _of_type(tuple, arguments)))
        elif name == 'BUILD':
            state = pop()
            _of_type(_Call, self.stack[-1]).state = state
        elif name not in ('PROTO', 'FRAME', 'STOP'):
            raise ValueError(f'it has the opcode {name}; only arrays and plain containers are allowed')

    def pop_to_mark(self):
        values = []
        while (value := self.stack.pop()) is not _MARK:
            values.append(value)
        return values[::-1]

    def call(self, name, arguments):
        """Returns the result of a call: bytes, or a `_Call`.

        Python 3 writes bytes as text that a call encodes. An honest pickle encodes each text once, so all encoded texts
        together are shorter than the pickle.
        """
        if name in _EMPTY_BYTES and not arguments:
            return b''
        if name != _ENCODE:
            return _Call(name, arguments)
        text, encoding = arguments
        if encoding not in ('latin1', b'latin1'):
            raise ValueError('it encodes bytes with another encoding than latin1')
        self.bytes_left -= len(_of_type(str, text))
        if self.bytes_left < 0:
            raise ValueError('it encodes more bytes than it has')
        return text.encode('latin-1')


def _admitted(module, name):
    found = _Name(_of_type(str, module), _of_type(str, name))
    if found not in _ADMITTED:
        raise ValueError(f'it refers to {module[:50]}.{name[:50]}; only arrays and plain containers are allowed')
    return found


def _of_type(kind, value):
    if type(value) is not kind:
        raise ValueError(f'it has a {type(value).__name__} where a {kind.__name__} belongs')
    return value


def _set_items(items, keys_and_values):
    for key, value in zip(keys_and_values[::2], keys_and_values[1::2], strict=True):
        items[key.decode('latin-1') if type(key) is bytes else _of_type(str, key)] = value
    return items


def as_array(value: Any) -> np.ndarray:
    """Returns a list, or the `_Call` of a NumPy array, as an array. Raises ValueError unless it holds whole numbers."""
    if type(value) is list:
        if not all(type(x) is int for x in value):
            raise ValueError('a list holds values that are not whole numbers')
        return np.array(value, np.int64)
    call = _of_type(_Call, value)
    if call.name in _NUMPY_NAMES['reconstruct'] and call.arguments[0] in _NUMPY_NAMES['ndarray']:
        _, shape, dtype, is_fortran, content = call.state
    elif call.name in _NUMPY_NAMES['frombuffer']:
        content, dtype, shape, order = call.arguments
        is_fortran = order == 'F'
    else:
        raise ValueError(f'it makes an array by calling {call.name.name}')
    if type(content) not in (bytes, bytearray) or not all(type(n) is int and n >= 0 for n in _of_type(tuple, shape)):
        raise ValueError('an array has no bytes or no shape')
    dtype = _dtype(_of_type(_Call, dtype))
    if math.prod(shape) * dtype.itemsize != len(content):
        raise ValueError(f'an array of shape {shape} has {len(content)} bytes')
    return np.frombuffer(content, dtype).reshape(shape, order='F' if is_fortran else 'C')


def _dtype(call):
    code, order = call.arguments[0], call.state[1]
    code = code.decode('latin-1') if type(code) is bytes else code
    order = order.decode('latin-1') if type(order) is bytes else order
    if call.name not in _NUMPY_NAMES['dtype'] or code not in ('u1', 'i1', 'u2', 'i2', 'u4', 'i4', 'u8', 'i8'):
        raise ValueError('an array holds values that are not whole numbers')
    if order not in ('<', '>', '|'):
        raise ValueError('an array has no byte order')
    return np.dtype(order + code)
