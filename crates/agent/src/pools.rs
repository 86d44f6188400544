//! What every host says of a pool that it has let go of, or is asked to.

use karst_model::{Error, InstanceId, PoolId};

/// Of whatever is asked of a pool that is closed.
pub fn closed(pool: PoolId) -> Error {
    Error::conflict("the storage pool is not active; start it first").with_context(pool)
}

/// Of a pool that is to be closed while a guest runs from it.
pub fn in_use(pool: PoolId, guest: InstanceId) -> Error {
    Error::conflict(format!("the storage pool is in use by instance {guest}, which runs; stop it first"))
        .with_context(pool)
}

/// Of a pool that is to be closed while something else is at work in it.
pub fn at_work(pool: PoolId) -> Error {
    Error::conflict(
        "a volume of the storage pool is being read or written just now; try again when that has ended",
    )
    .with_context(pool)
}
