//! Pools that this host makes, opens and lets go of.
//!
//! One that was let go of is known all the same: `registry/pools/ID.closed` says that it is not opened when the host starts, and
//! keeps what the pool said of itself. What is in it stays where it is, and nothing of it can be had until it is opened again.

use crate::{RealAgent, agent::blocking, pool_kinds, pools::Purpose, registry::GuestRecord};
use karst_agent::pools::{at_work, closed, in_use};
use karst_host::{Program, run};
use karst_model::{
    Error, PoolId, Result, VolumeId,
    pool_life::FoundSource,
    spec::{PoolSource, PoolSpec},
    storage::PoolKind,
};
use karst_storage::PoolDriver;
use std::{collections::BTreeSet, sync::Arc, time::Duration};

/// How often it is looked whether what is at work in a pool has ended, and how long apart.
const LOOKS: u32 = 50;
const PAUSE: Duration = Duration::from_millis(100);
/// Time that the tools of a kind have to say what there is.
const ASKING: Duration = Duration::from_secs(30);

impl RealAgent {
    /// Makes what is missing of a pool, and opens it.
    pub(crate) async fn ensure_pool(&self, spec: PoolSpec) -> Result<()> {
        let _lock = self.lock(spec.id.0).await;
        self.note_pool(&spec).await?;
        self.open_pool(&spec, Purpose::Make).await?;
        self.mark_open(spec.id).await
    }

    /// Opens one that was made before.
    pub(crate) async fn start_pool(&self, spec: PoolSpec) -> Result<()> {
        let _lock = self.lock(spec.id.0).await;
        let known = self.note_pool(&spec).await?;
        // Its own file may have grown since.
        let opened = self.open_pool(known.as_ref().unwrap_or(&spec), Purpose::Use).await;
        if opened.is_err() && known.is_none() {
            let (registry, id) = (self.registry.clone(), spec.id);
            blocking(move || registry.remove_pool(id)).await?;
        }
        opened?;
        self.mark_open(spec.id).await
    }

    /// Writes down what a pool is, before anything is made of it; answers what it was written down as before.
    async fn note_pool(&self, spec: &PoolSpec) -> Result<Option<PoolSpec>> {
        let known = self.registry.pool(spec.id)?;
        match &known {
            Some(old) if !old.is_same_pool(spec) => {
                return Err(Error::conflict(format!("pool {} is there already, and different", spec.id)));
            }
            Some(_) => {}
            None => {
                self.options.policy.check_pool_kind(spec.kind)?;
                pool_kinds::ready(spec.kind).await?;
                if let PoolSource::Granted { source } = &spec.source {
                    self.options.policy.check_pool_source(spec.kind, source)?;
                }
                let (registry, spec) = (self.registry.clone(), spec.clone());
                blocking(move || registry.put_pool(&spec)).await?;
            }
        }
        Ok(known)
    }

    async fn mark_open(&self, id: PoolId) -> Result<()> {
        let registry = self.registry.clone();
        blocking(move || registry.forget_closed(id)).await
    }

    /// Lets go of a pool.
    pub(crate) async fn stop_pool(&self, id: PoolId) -> Result<()> {
        let _lock = self.lock(id.0).await;
        let Some(spec) = self.registry.pool(id)? else { return Ok(()) };
        // A call that was broken off may have let go of it while a guest has something of it: it is looked into again.
        if self.registry.closed(id).is_some()
            && !self.has_pool(id)
            && !self.all_guests().is_empty()
            && let Err(e) = self.open_pool(&spec, Purpose::Use).await
        {
            tracing::warn!(pool = %id, error = %e, context = e.context.as_deref(), "a pool is closed again unseen");
        }
        let open = self.pool(id).ok();
        let said = match &open {
            Some(pool) => crate::descriptions::said(&**pool, None).await?,
            None => self.registry.closed(id).flatten(),
        };
        let registry = self.registry.clone();
        blocking(move || registry.put_closed(id, said)).await?;
        // From here on nobody gets it who has not got it already.
        self.forget_pool(id);
        if let Some(pool) = open
            && let Err(e) = self.let_go(id, pool).await
        {
            self.mark_open(id).await?;
            return Err(e);
        }
        // Also of one that an interrupted call has let go of already.
        self.pool_place(id).close(&spec).await
    }

    /// Waits until nobody has the pool any more; gives it back when somebody keeps it.
    async fn let_go(&self, id: PoolId, pool: Arc<dyn PoolDriver>) -> Result<()> {
        let kept = match self.demand_no_guest(id, &*pool).await {
            Ok(()) => {
                let mut looks = 0;
                while Arc::strong_count(&pool) > 1 && looks < LOOKS {
                    self.env.sleep(PAUSE).await;
                    looks += 1;
                }
                match Arc::strong_count(&pool) {
                    1 => pool.flush().await,
                    _ => Err(at_work(id)),
                }
            }
            refused => refused,
        };
        if kept.is_err() {
            self.keep_pool(id, pool);
        } else {
            pool.settle().await;
        }
        kept
    }

    /// Nothing that runs has a volume of the pool. A start that is under way has the lock of its guest, and ends before.
    async fn demand_no_guest(&self, id: PoolId, pool: &dyn PoolDriver) -> Result<()> {
        let volumes: BTreeSet<VolumeId> = pool.list().await?.into_iter().map(|v| v.id).collect();
        let has = |record: &GuestRecord| {
            let mut disks = record.volumes.iter().chain(&record.copies);
            volumes.contains(&record.root) || disks.any(|v| volumes.contains(v))
        };
        for (guest, record) in self.all_guests() {
            if !has(&record) {
                continue;
            }
            let _lock = self.lock(guest.0).await;
            if self.runs(guest).await? {
                return Err(in_use(id, guest));
            }
        }
        Ok(())
    }

    /// Refuses what would pass over a pool that cannot be looked into.
    pub(crate) fn demand_open(&self, id: PoolId) -> Result<()> {
        match self.registry.closed(id) {
            Some(_) => Err(closed(id)),
            None => Ok(()),
        }
    }

    /// What of this host could become a pool, as far as its policy grants it.
    pub(crate) async fn sources(&self, kind: PoolKind) -> Result<Vec<FoundSource>> {
        let asked = match kind {
            PoolKind::Dir | PoolKind::Btrfs => return Ok(vec![]),
            PoolKind::Lvm => {
                let columns = ["pvs", "--noheadings", "--separator", "|", "-o", "vg_name,pv_name"];
                run(Program::Lvm).args(columns)
            }
            PoolKind::Zfs => run(Program::Zpool).args(["list", "-H", "-P", "-L", "-v"]),
        };
        pool_kinds::ready(kind).await?;
        let out = asked.timeout(ASKING).ok().await?;
        let text = String::from_utf8_lossy(&out);
        let mut found = if kind == PoolKind::Lvm { groups(&text) } else { zpools(&text) };
        found.retain(|of| self.options.policy.check_pool_source(kind, &of.name).is_ok());
        Ok(found)
    }
}

/// By lines `group|device` of `pvs`: those that are in no group have none.
fn groups(text: &str) -> Vec<FoundSource> {
    let mut found: Vec<FoundSource> = vec![];
    for line in text.lines() {
        let Some((group, device)) = line.trim().split_once('|').filter(|(group, _)| !group.is_empty()) else {
            continue;
        };
        add(&mut found, group, Some(device));
    }
    found
}

/// By the lines of `zpool list -v`: what is indented belongs to the pool above it, and is a device when it is a path.
fn zpools(text: &str) -> Vec<FoundSource> {
    let mut found: Vec<FoundSource> = vec![];
    let mut pool = None;
    for line in text.lines() {
        let Some(first) = line.split_whitespace().next() else { continue };
        if !line.starts_with(char::is_whitespace) {
            pool = Some(first);
            add(&mut found, first, None);
        } else if let Some(pool) = pool
            && first.starts_with('/')
        {
            add(&mut found, pool, Some(first));
        }
    }
    found
}

fn add(found: &mut Vec<FoundSource>, name: &str, device: Option<&str>) {
    let device = device.map(str::to_owned);
    match found.iter_mut().find(|of| of.name == name) {
        Some(of) => of.devices.extend(device),
        None => found.push(FoundSource { name: name.to_owned(), devices: device.into_iter().collect() }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_and_zpools_are_read() {
        let source = |name: &str, devices: &[&str]| FoundSource {
            name: name.into(),
            devices: devices.iter().map(|d| (*d).to_owned()).collect(),
        };
        let text = "  vg0|/dev/sdb\n  |/dev/sdd\n  vg1|/dev/sde\n  vg0|/dev/sdc\n\n";
        assert_eq!(groups(text), [source("vg0", &["/dev/sdb", "/dev/sdc"]), source("vg1", &["/dev/sde"])]);
        let text = "tank\t9.50G\t1G\n\tmirror-0\t9.50G\n\t\t/dev/sdb1\t-\n\t\t/dev/sdc1\t-\nsmall\t1G\n\t/dev/vdd\t1G\n";
        assert_eq!(
            zpools(text),
            [source("tank", &["/dev/sdb1", "/dev/sdc1"]), source("small", &["/dev/vdd"])]
        );
        assert!(groups("").is_empty() && zpools("").is_empty());
    }
}
