"""Kokoro clips FIRST..LAST into a bank folder of their own, one thread."""
import sys; sys.path.insert(0, "tools")
import onnxruntime
real = onnxruntime.InferenceSession
def one_thread(model, **kw):
    o = onnxruntime.SessionOptions(); o.intra_op_num_threads = 1; o.inter_op_num_threads = 1
    return real(model, sess_options=o, **kw)
onnxruntime.InferenceSession = one_thread
import make_tiny as m
from pathlib import Path
first, last, out = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
engine = m.ENGINES["kokoro"]
m.ENGINES["kokoro"] = lambda numbers, *a: engine(range(numbers.start + first, numbers.stop + first), *a)
m.COUNTS["kokoro"] = last - first
m.make_bank(out, ["kokoro"])
