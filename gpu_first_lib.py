from gpu_tune import *
# correctness against float64 on this device
import jax
def grads64(o):
    from jax_causal_conv import ssd
    with jax.enable_x64(True):
        f=lambda *a: ssd(*a[:6],dt_bias=a[6],dt_softplus=True,implementation="xla")
        a=[jnp.asarray(np.asarray(v.astype(jnp.float32)),jnp.float64) for v in o[:7]]
        dy=jnp.asarray(np.asarray(o.dy.astype(jnp.float32)),jnp.float64)
        return [np.asarray(g) for g in jax.jit(lambda a,dy: jax.vjp(f,*a)[1](dy))(a,dy)]
sub=lambda o: o._replace(x=o.x[:,:,:8],dt=o.dt[:,:,:8],A=o.A[:8],D=o.D[:8],dt_bias=o.dt_bias[:8],dy=o.dy[:,:,:8])
