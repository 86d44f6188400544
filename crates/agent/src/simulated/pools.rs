//! Pools of a simulated host that it opens and lets go of, and what could become one.

use super::{SimulatedAgent, state::State, work::no_pool};
use karst_model::{
    Error, PoolId, Result,
    pool_life::FoundSource,
    spec::{DiskSpec, PoolSpec},
    storage::PoolKind,
};

impl State {
    /// Nothing can be had of a pool that the host has let go of.
    pub(super) fn demand_open(&self, pool: PoolId) -> Result<()> {
        if !self.pools.contains_key(&pool) {
            return Err(no_pool(pool));
        }
        match self.closed.contains(&pool) {
            true => Err(crate::pools::closed(pool)),
            false => Ok(()),
        }
    }
}

impl SimulatedAgent {
    pub(super) fn open_pool(&self, spec: &PoolSpec) -> Result<()> {
        let mut state = self.lock();
        match state.pools.get(&spec.id) {
            Some(old) if !old.is_same_pool(spec) => {
                Err(Error::conflict(format!("pool {} is there already, and different", spec.id)))
            }
            Some(_) => {
                state.closed.remove(&spec.id);
                Ok(())
            }
            None => {
                Err(Error::unavailable("what it is made of is not there; is its disk attached and mounted?"))
            }
        }
    }

    pub(super) fn close_pool(&self, pool: PoolId) -> Result<()> {
        let mut state = self.settled();
        if !state.pools.contains_key(&pool) {
            return Ok(());
        }
        let runs = state.guests.iter().find(|(_, guest)| {
            let disks = guest.spec.disks.iter().filter_map(DiskSpec::volume);
            let mut pools = disks.map(|(pool, _)| pool).chain([guest.spec.root.pool]);
            guest.runs() && pools.any(|of| of == pool)
        });
        if let Some((id, _)) = runs {
            return Err(crate::pools::in_use(pool, *id));
        }
        state.closed.insert(pool);
        Ok(())
    }

    /// Those of a host with a group on two disks.
    pub(super) fn sources(&self, kind: PoolKind) -> Result<Vec<FoundSource>> {
        Ok(match kind {
            PoolKind::Lvm => {
                vec![FoundSource { name: "vg0".into(), devices: vec!["/dev/sdb".into(), "/dev/sdc".into()] }]
            }
            PoolKind::Dir | PoolKind::Btrfs | PoolKind::Zfs => vec![],
        })
    }
}
