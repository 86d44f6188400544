//! Moving: a stopped instance goes to another pool, project or name with its snapshots, and stays the same instance: its UUID,
//! VMID and addresses are kept. The root of a virtual machine that runs goes to another pool by [`super::disk_copy`].
//!
//! Another pool means another volume. It is made beside the old one, then one transaction lets instance and snapshots refer
//! to it, and only then the old one goes. Should that fail, the old one stays recorded as the instance's and goes with it.

use super::{
    copy::VolumeCopy,
    create::check_devices,
    disk_copy::{CopyDisk, CopyTarget},
    disks::check_disks,
    expand, lock, path,
};
use crate::{
    Engine, EngineInner, Records,
    context::Context,
    db::Tx,
    events::{OLD_NAME, Subject},
    operations::{LiveOperation, NewOperation},
    saga::{Saga, StepContext, runner},
    snapshots::demand_welcome,
    tenancy::limits::{Planned, admit},
    volumes,
};
use async_trait::async_trait;
use karst_agent::VolumeRef;
use karst_model::{
    Config, Error, Name, ProfileId, ProjectId, Result, SnapshotId, VolumeId,
    access::Permission,
    device::Devices,
    instance::{Instance, InstanceKind, Lifecycle},
    keys,
    project::Project,
    snapshot::Snapshot,
    spec::{VolumeSource, VolumeSpec},
    storage::Volume,
    template::Trigger,
};
use serde::{Deserialize, Serialize};
use std::{collections::BTreeMap, sync::Arc, time::Duration};

/// Most snapshots of an instance that is moved: one transaction changes all.
const MOST: usize = 80;
const LONG: Duration = Duration::from_secs(3600);

/// Where an instance is to go, and what is to be different there.
#[derive(Debug, Clone, Default)]
pub struct MoveInstance {
    /// Name there; `None`: as it is.
    pub name: Option<String>,
    /// Pool of its root; `None`: where it is.
    pub pool: Option<String>,
    /// Project; `None`: where it is.
    pub project: Option<String>,
    /// Over its own configuration.
    pub config: Config,
    /// Over its own devices.
    pub devices: Devices,
    /// Profiles; `None`: those of the same names.
    pub profiles: Option<Vec<String>>,
}

fn said(text: &Option<String>) -> Option<&str> {
    text.as_deref().filter(|t| !t.is_empty())
}

impl MoveInstance {
    /// The pool, when it is all that becomes another one. Clients say the rest too, as it is.
    fn only_pool(&self, records: &Records, project: &Project, row: &Instance) -> Option<&str> {
        let same = |said: Option<&str>, is: &str| said.is_none_or(|s| s == is);
        let named = |id: &ProfileId| records.profiles.get(id).map(|p| p.name.to_string());
        let as_it_is = same(said(&self.name), &row.name)
            && same(said(&self.project), &project.name)
            && self.config.iter().all(|(k, v)| row.config.get(k) == Some(v))
            && self.devices.iter().all(|(n, keys)| row.devices.get(n) == Some(keys))
            && self
                .profiles
                .as_ref()
                .is_none_or(|p| *p == row.profiles.iter().filter_map(named).collect::<Vec<_>>());
        said(&self.pool).filter(|_| as_it_is)
    }
}

impl Engine {
    /// Moves a stopped instance, or the root of a virtual machine that runs to another pool and nothing else.
    ///
    /// # Errors
    /// Invalid by field, not found, conflict (taken name, running, busy), quota, forbidden.
    pub async fn instance_move(
        &self,
        context: &Context,
        project: &str,
        name: &str,
        request: MoveInstance,
    ) -> Result<LiveOperation> {
        let from = self.project(context, project, Permission::ResourceEdit)?;
        let to = match said(&request.project) {
            Some(to) => self.project(context, to, Permission::ResourceEdit).map_err(|e| e.at("project"))?,
            None => from.clone(),
        };
        let inner = self.inner();
        let live = {
            let records = inner.inventory.read();
            let row = records.instance(&from, name)?;
            let none = Devices::new();
            let has = if to.id == from.id { &row.devices } else { &none };
            super::disks::demand_drives(context, has, &row.devices)?;
            super::disks::demand_drives(context, has, &request.devices)?;
            let machine = row.kind == InstanceKind::VirtualMachine && volumes::runs(&records, row);
            request.only_pool(&records, &from, row).filter(|_| machine).map(str::to_owned)
        };
        if let Some(pool) = live {
            let to = CopyTarget::Pool(pool);
            let copy = CopyDisk { device: None, to, hold: false, speed: 0, synchronous: false };
            return self.disk_copy_begin(context, project, name, copy).await;
        }
        runner::start::<InstanceMove>(inner, context, |tx| {
            let records = inner.inventory.read();
            let row = records.instance(&from, name)?;
            if row.lifecycle != Lifecycle::Ready {
                return Err(Error::conflict(format!("instance {name:?} is being made or deleted")));
            }
            if volumes::runs(&records, row) {
                let beside = match row.kind {
                    InstanceKind::VirtualMachine => "; only its pool changes while it runs",
                    InstanceKind::Container => "",
                };
                return Err(Error::conflict(format!(
                    "instance {name:?} is running; stop it before it is moved{beside}"
                )));
            }
            if row.stateful {
                let text =
                    format!("instance {name:?} keeps its memory over its stop; start it and stop it without");
                return Err(Error::conflict(text));
            }
            let all = records.snapshots_of(row.id);
            if all.len() > MOST {
                let text = format!("instance {name:?} has {} snapshots; at most {MOST} are moved", all.len());
                return Err(Error::conflict(text));
            }
            tx.expect(row);
            tx.expect(&from);
            tx.expect(&to);
            let mut instance: Instance = row.value.clone();
            if let Some(new) = said(&request.name) {
                instance.name = Name::parse("name", new)?;
            }
            if *instance.name != *row.name {
                super::templates::defer(&mut instance, Trigger::Rename);
            }
            let elsewhere = to.id != from.id;
            if elsewhere || *instance.name != *row.name {
                inner.demand_free_name(&records, to.id, &instance.name)?;
            }
            instance.project = to.id;
            if elsewhere || request.profiles.is_some() {
                let named = |id: &ProfileId| records.profiles.get(id).map(|p| p.name.to_string());
                let names = request.profiles.clone();
                let names = names.unwrap_or_else(|| row.profiles.iter().filter_map(named).collect());
                let home = records.home(&to, "features.profiles");
                instance.profiles.clear();
                for (n, name) in names.iter().enumerate() {
                    let profile = records.profile(home, name).map_err(|e| e.at(format!("profiles[{n}]")))?;
                    tx.expect(profile);
                    crate::tenancy::profiles::demand_idle(&records, tx, profile.id)?;
                    tx.touch(&crate::tenancy::profile_uses(profile.id));
                    instance.profiles.push(profile.id);
                }
            }
            if let Some(key) = request.config.keys().find(|k| k.starts_with("volatile.")) {
                let text = "volatile keys are kept by the platform and cannot be set";
                return Err(Error::invalid(format!("config.{key}"), text));
            }
            instance.config.extend(request.config.clone());
            instance.config.retain(|_, v| !v.is_empty());
            keys::check(&instance.config, Some(row.kind))?;
            check_devices(&request.devices)?;
            records.demand_seen_acls(context, &to, &request.devices)?;
            instance.devices.extend(request.devices.clone());
            let pool = match said(&request.pool) {
                Some(pool) => records.pool(pool).map_err(|e| e.at("pool"))?,
                None => records.pools.get(&row.pool).ok_or_else(|| Error::not_found("the pool is gone"))?,
            };
            let (config, devices) = records.expanded(&instance);
            keys::check(&config, Some(row.kind)).map_err(|e| e.with_context("expanded"))?;
            let mut parsed = expand::parse_devices(&devices)?;
            if parsed.root.1.pool != *pool.name {
                // What a profile says of the pool is not so any more, or not there.
                pin(&mut instance.devices, &devices, &parsed.root.0, &pool.name);
                parsed = expand::parse_devices(&records.expanded(&instance).1)?;
            }
            if elsewhere {
                demand_welcome(
                    &records,
                    tx,
                    to.id,
                    all.len(),
                    "delete them first, or move a copy without them",
                )?;
            }
            if pool.id == row.pool && !elsewhere && instance.name == row.name {
                return Err(Error::invalid("pool", format!("instance {name:?} is there already")));
            }
            check_disks(&records, tx, &instance, &parsed)?;
            crate::storage::use_pool(tx, pool)?;
            let root = records.volumes.get(&row.root);
            let root = root.ok_or_else(|| Error::not_found("the root volume is gone"))?;
            let mut volume: Volume = root.value.clone();
            volume.project = to.id;
            volume.name = instance.name.to_string();
            volume.spec_version += 1;
            let mut copy = None;
            if pool.id != row.pool {
                crate::checkpoints::demand_none(&records, root.id, "which does not go to another pool")?;
                crate::layers::demand_one(&records, root.id, "which does not go to another pool")?;
                volume.id = VolumeId(inner.env.uuid());
                volume.pool = pool.id;
                instance.pool = pool.id;
                instance.root = volume.id;
                let kept =
                    |s: &Snapshot| s.volumes.iter().find(|(v, _)| *v == root.id).map(|(_, id)| (*id, *id));
                copy = Some(VolumeCopy {
                    spec: VolumeSpec {
                        id: volume.id,
                        pool: volume.pool,
                        content: volume.content,
                        size: volume.size,
                        source: VolumeSource::Empty,
                    },
                    from: VolumeRef { pool: root.pool, volume: root.id },
                    history: all.iter().filter_map(|s| kept(s)).collect(),
                    last: None,
                    full: pool.full_copy(&volume.config),
                });
            }
            instance.identities = inner.assign_identities(
                &records,
                &row.identities,
                &parsed,
                row.hardware.as_ref(),
                instance.root,
            );
            inner.check_nics(&records, tx, &instance, &parsed)?;
            inner.demand_own_label(&records, &instance, "name")?;
            instance.spec_version += 1;
            inner.guest_spec(&records, &instance, 0)?;
            // Its root is as large as the one that it has: the new one is not recorded yet.
            let measured = Instance { root: row.root, ..instance.clone() };
            let planned = Planned { instance: Some(&measured), ..Default::default() };
            let only_pool = !elsewhere && pool.id != row.pool;
            admit(&records, tx, to.id, &planned)
                .map_err(|e| if only_pool && e.field.is_none() { e.at("pool") } else { e })?;
            let path = path(&to.name, &instance.name);
            let device = parsed.root.0.clone();
            let plan = MovePlan {
                snapshots: all.iter().map(|s| (s.id, s.devices.clone(), s.profiles.clone())).collect(),
                device,
                pool: pool.name.to_string(),
                old: row.value.clone(),
                new: instance,
                old_volume: root.value.clone(),
                volume,
                copy,
                path: path.clone(),
            };
            let mut new = NewOperation::task("Moving instance", Some(from.id), "instances", path);
            new.may_cancel = true;
            Ok((plan, new))
        })
        .await
    }
}

/// Says in the devices themselves in which pool the root is.
pub(super) fn pin(devices: &mut Devices, expanded: &Devices, root: &str, pool: &str) {
    let mut keys = devices.get(root).or_else(|| expanded.get(root)).cloned().unwrap_or_default();
    keys.insert("pool".into(), pool.to_owned());
    devices.insert(root.to_owned(), keys);
}

/// Plan of [`InstanceMove`].
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct MovePlan {
    old: Instance,
    new: Instance,
    old_volume: Volume,
    /// The root as it is to be: another one where the pool is.
    volume: Volume,
    copy: Option<VolumeCopy>,
    /// Snapshots with their devices and profiles as they are.
    snapshots: Vec<(SnapshotId, Devices, Vec<ProfileId>)>,
    /// Name of the root disk, and of the pool where it is to be.
    device: String,
    pool: String,
    path: String,
}

impl MovePlan {
    fn renamed(&self) -> bool {
        self.old.project != self.new.project || self.old.name != self.new.name
    }

    /// Lets instance, snapshots and volume be as `to` says; done already when they are.
    async fn switch(&self, cx: &StepContext, forward: bool) -> Result<()> {
        let (there, here) = if forward { (&self.new, &self.old) } else { (&self.old, &self.new) };
        let (volume, other) =
            if forward { (&self.volume, &self.old_volume) } else { (&self.old_volume, &self.volume) };
        cx.engine
            .transact(|records, tx| {
                let row = records.instances.get(&self.old.id);
                let row = row.ok_or_else(|| Error::not_found("the instance is gone"))?;
                let is = |i: &Instance| {
                    (i.root, i.project, i.name.clone()) == (row.root, row.project, row.name.clone())
                };
                if is(there) || !is(here) {
                    return Ok(());
                }
                tx.replace(row, there);
                if forward && (there.project, there.pool) != (row.project, row.pool) {
                    // Admitted when it was planned; another one may have come there meanwhile.
                    let planned = Planned { instance: Some(there), ..Default::default() };
                    admit(records, tx, there.project, &planned)?;
                }
                if self.copy.is_none()
                    && let Some(row) = records.volumes.get(&volume.id)
                {
                    tx.replace(row, volume);
                }
                for (id, devices, profiles) in &self.snapshots {
                    let Some(row) = records.snapshots.get(id) else { continue };
                    let mut snapshot = row.value.clone();
                    for (of, _) in snapshot.volumes.iter_mut().filter(|(of, _)| *of == other.id) {
                        *of = volume.id;
                    }
                    if forward {
                        let root = self.new.devices.get(&self.device);
                        if let Some(root) = root {
                            let expanded = Devices::from([(self.device.clone(), root.clone())]);
                            pin(&mut snapshot.devices, &expanded, &self.device, &self.pool);
                        }
                        if self.old.project != self.new.project {
                            snapshot.profiles.clone_from(&self.new.profiles);
                        }
                    } else {
                        snapshot.devices.clone_from(devices);
                        snapshot.profiles.clone_from(profiles);
                    }
                    tx.replace(row, &snapshot);
                }
                Ok(())
            })
            .await
    }
}

/// Copies the volume where it is to be in another pool, lets the records refer to it, and drops the old one.
pub struct InstanceMove;

#[async_trait]
impl Saga for InstanceMove {
    const NAME: &'static str = "instance-move";
    const STEPS: &'static [&'static str] = &["volume", "switch", "drop"];
    type Plan = MovePlan;
    /// The old volume could not be dropped.
    type Outputs = bool;

    // The last step never fails by itself, but destroys what no undo brings back: neither a cancel nor a lost answer may lead back
    // from it.
    fn retries(step: usize) -> u32 {
        if step == 2 { 5 } else { 0 }
    }

    fn has(plan: &MovePlan, step: usize) -> bool {
        step == 1 || plan.copy.is_some()
    }

    fn locks(plan: &MovePlan) -> Vec<String> {
        vec![lock(plan.old.id)]
    }

    fn begin(plan: &MovePlan, _: &EngineInner, tx: &mut Tx) -> Result<()> {
        if plan.copy.is_some() {
            tx.create(&plan.volume);
        }
        if plan.renamed() {
            let (scope, id) = (plan.new.project.to_string(), plan.new.id.to_string());
            tx.take_name("instances", &scope, &plan.new.name, &id);
        }
        Ok(())
    }

    async fn run(cx: &StepContext, plan: &MovePlan, left: &mut bool, step: usize) -> Result<()> {
        match (step, &plan.copy) {
            (0, Some(copy)) => copy.run(cx, &*cx.agent(plan.old.node)?).await,
            (1, _) => plan.switch(cx, true).await,
            (2, Some(copy)) => {
                let dropped = cx.agent(plan.old.node)?.volume_delete(&cx.mutate(LONG), copy.from).await;
                *left = dropped.is_err();
                // Nothing is undone from here on: what refers to the new one is right, whatever became of the old one.
                if let Err(e) = dropped {
                    tracing::warn!(instance = %plan.old.id, error = %e, "the volume that was moved from stays until the instance is deleted");
                }
                Ok(())
            }
            _ => Ok(()),
        }
    }

    async fn undo(cx: &StepContext, plan: &MovePlan, _: &bool, step: usize) -> Result<()> {
        match (step, &plan.copy) {
            (0, Some(copy)) => copy.undo(cx, &*cx.agent(plan.old.node)?).await,
            (1, _) => plan.switch(cx, false).await,
            _ => Ok(()),
        }
    }

    fn commit(plan: &MovePlan, left: &bool, engine: &EngineInner, tx: &mut Tx) -> Result<()> {
        if plan.renamed() {
            release(tx, plan.old.project, &plan.old);
        }
        let records = engine.inventory.read();
        if plan.copy.is_some()
            && !left
            && let Some(row) = records.volumes.get(&plan.old_volume.id)
        {
            tx.delete(row);
        }
        Ok(())
    }

    fn abort(plan: &MovePlan, _: &bool, engine: &EngineInner, tx: &mut Tx) -> Result<()> {
        if plan.renamed() {
            release(tx, plan.new.project, &plan.new);
        }
        let records = engine.inventory.read();
        if plan.copy.is_some()
            && let Some(row) = records.volumes.get(&plan.volume.id)
        {
            tx.delete(row);
        }
        Ok(())
    }

    fn announce(plan: &MovePlan) -> Vec<(&'static str, String)> {
        vec![(if plan.renamed() { "instance-renamed" } else { "instance-updated" }, plan.path.clone())]
    }

    fn told(plan: &MovePlan, _: &Self::Outputs) -> BTreeMap<String, serde_json::Value> {
        match plan.old.name != plan.new.name {
            true => {
                BTreeMap::from([(OLD_NAME.to_owned(), serde_json::Value::from(plan.old.name.to_string()))])
            }
            false => BTreeMap::new(),
        }
    }

    // In the project of the operation, from which it went, another one may have the name that it has where it is now.
    fn subject(plan: &MovePlan) -> Option<Subject> {
        Some(Subject::Instance(Arc::new(plan.new.clone()), None))
    }
}

fn release(tx: &mut Tx, project: ProjectId, instance: &Instance) {
    tx.release_name("instances", &project.to_string(), &instance.name, &instance.id.to_string());
}
