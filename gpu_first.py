from gpu_tune import *
print(jax.devices())
# correctness against float64 on this device
import jax
def grads64(o):
    from jax_causal_conv import ssd
    with jax.enable_x64(True):
        f=lambda *a: ssd(*a[:6],dt_bias=a[6],dt_softplus=True,implementation="xla")
        a=[jnp.asarray(np.asarray(v.astype(jnp.float32)),jnp.float64) for v in o[:7]]
        dy=jnp.asarray(np.asarray(o.dy.astype(jnp.float32)),jnp.float64)
        return [np.asarray(g) for g in jax.jit(lambda a,dy: jax.vjp(f,*a)[1](dy))(a,dy)]
o=operands(2,600)
sub=lambda o: o._replace(x=o.x[:,:,:8],dt=o.dt[:,:,:8],A=o.A[:8],D=o.D[:8],dt_bias=o.dt_bias[:8],dy=o.dy[:,:,:8])
o=sub(o)
want=grads64(o)
for exact in (True,False):
    g=jax.jit(functools.partial(bwd,exact,None))(o); g2=jax.jit(functools.partial(bwd,exact,None))(o)
    dx,ddt,dA,dB,dC,db,dD=[np.asarray(a.astype(jnp.float32),np.float64) for a in g]
    got=[dx,ddt,dA,dB,dC,dD.sum(1),db]
    print("exact" if exact else "default",{n:f"{abs(a-b).max()/abs(b).max():.1e}" for n,a,b in zip(("x","dt","A","B","C","D","bias"),got,want)},"same bits",all(np.array_equal(np.asarray(a),np.asarray(b)) for a,b in zip(g,g2)),flush=True)
sizes={"8x2048":operands(8,2048),"1x2048":operands(1,2048),"1x8192":operands(1,8192),"4x512":operands(4,512)}
for n,o in sizes.items():
    for exact in (True,False):
        try:
            show(f"{n} fwd {'exact' if exact else 'default'}",times(functools.partial(fwd,exact),o))
            show(f"{n} bwd {'exact' if exact else 'default'}",times(functools.partial(bwd,exact,None),o))
        except Exception: traceback.print_exc()
o=sizes["8x2048"]; t=default(o)
for change in ({"pair_warps":8},{"head_warps":4},{"token_warps":8},{"state_stages":3},{"state_stages":1},{"head_stages":1},{"head_stages":3},{"token_stages":1},{"token_stages":3},{"pair_stages":1},{"pair_stages":3},{"tiles":2},{"tiles":1},{"chunk":32},{"item_block":40},{"state_warps":8},{"pair_warps":8,"pair_stages":3}):
    try: show(f"8x2048 {change}",times(functools.partial(bwd,True,dataclasses.replace(t,**change)),o))
    except Exception as e: print(change,"failed",str(e)[:200],flush=True)
