from gpu_first_lib import *
o=operands(2,600)
o=sub(o)
want=grads64(o)
for exact in (True,):
    g=jax.jit(functools.partial(bwd,exact,None))(o); g2=jax.jit(functools.partial(bwd,exact,None))(o)
    dx,ddt,dA,dB,dC,db,dD=[np.asarray(a.astype(jnp.float32),np.float64) for a in g]
    got=[dx,ddt,dA,dB,dC,dD.sum(1),db]
    print("exact" if exact else "default",{n:f"{abs(a-b).max()/abs(b).max():.1e}" for n,a,b in zip(("x","dt","A","B","C","D","bias"),got,want)},"same bits",all(np.array_equal(np.asarray(a),np.asarray(b)) for a,b in zip(g,g2)),flush=True)
o=operands(8,2048); t=default(o)
V=[dict(head_warps=4,head_stages=3,pair_stages=3,token_stages=1),dict(head_warps=4,head_stages=2,pair_stages=4,token_stages=2),dict(head_warps=8,head_stages=3,pair_stages=2,token_stages=3),dict(head_warps=4,head_stages=4,pair_stages=3,token_stages=2,tiles=2)]
for change in V:
    for exact in (True,False):
        try: show(f"8x2048 {exact} {change}",times(functools.partial(bwd,exact,dataclasses.replace(t,**change)),o))
        except Exception as e: print(change,"failed",str(e)[:200],flush=True)
for n,o in {"1x2048":operands(1,2048)}.items():
  for blocks in (80,40,20,10,5):
    try: show(f"{n} {blocks}",times(functools.partial(bwd,True,dataclasses.replace(default(o),**V[0],item_block=blocks)),o))
    except Exception as e: print("failed",str(e)[:200],flush=True)
