"""Times the kernels of the SSD's gradient, one by one, with several tiles."""
import dataclasses, functools, sys, json, os, collections, tempfile, glob, traceback
import jax, jax.numpy as jnp, numpy as np
from jax_causal_conv.kernels import launch_ssd_backward as L, tiles, record, bridge, launch_ssd
from jax_causal_conv.operands import *
from benchmarks.timing import device_kernels, Prepared
from benchmarks.ssd_workload import SsdWorkload
from benchmarks.workload import normal
call=functools.partial(bridge.call,compute_capability=90)
def operands(rows,T):
    w=SsdWorkload("ssd",(T,)*rows)
    r=lambda a:a.reshape(rows,T,*a.shape[1:])
    return SSDBackwardOperands(r(w.x),r(w.dt),w.A,r(w.B),r(w.C),w.D,w.dt_bias,None,None,r(normal(6,w.x.shape,"bfloat16")))
def times(f,*a,calls=10):
    f=jax.jit(f)
    jax.block_until_ready(f(*a))
    one=Prepared(functools.partial(f,*a))
    _,k=device_kernels(one,calls)
    return {n.split("(")[0][:48]:(float(np.median(v)),len(v)/calls) for n,v in k.items()}
def show(name,k):
    tot=sum(m*c for m,c in k.values())
    print(f"{name}: {tot:.0f} us  "+", ".join(f"{n.replace('backward_','').replace('_kernel','')} {m*c:.0f}" for n,(m,c) in sorted(k.items(),key=lambda e:-e[1][0]*e[1][1]) if m*c>2),flush=True)
def spec(exact): return SSDSpec(64,dt_softplus=True,exact=exact)
def fwd(exact,o):
    return record.run(launch_ssd.dense(spec(exact),SSDOperands(*o[:9])),call)
def bwd(exact,tile,o):
    return record.run(L.backward(spec(exact),o,tile),call)
def default(o):
    return tiles.ssd_backward(o.x.shape[2:],o.B.shape[2:],2,o.x.shape[0],o.x.shape[1])
