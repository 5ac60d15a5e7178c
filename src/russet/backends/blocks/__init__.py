"""The blocks of UNet and VAE in a form that passes can steer: in place, on donated buffers, with parts precomputed.

Each class is the plain block of ``russet.models`` with another ``forward``; a pass gives it to a module that nobody
has changed or hooked, and takes it away again. With gradients enabled the plain ``forward`` runs. What a pass
contributes is an attribute, by default absent: a block to which nothing was contributed computes what the plain one
does.
"""
