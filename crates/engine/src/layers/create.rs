//! Putting layers over disks, and the snapshot that is the record of that moment.

use super::chosen;
use crate::{
    Engine, EngineInner, Records,
    compute::{expand, lock, path},
    context::Context,
    db::Tx,
    operations::{LiveOperation, NewOperation},
    saga::{Saga, StepContext, runner},
    snapshots::{
        Taken, check_note,
        pause::{PausedGuest, pause, release, resume},
    },
    tenancy::{restricted, rules::ProjectRules},
    volumes,
};
use async_trait::async_trait;
use karst_agent::{GuestRef, LayerOver, MachineLayersAdd, VolumeRef};
use karst_model::{
    Error, Name, NodeId, Result, SnapshotId, VolumeId,
    access::Permission,
    guest::Observed,
    instance::{InstanceKind, Lifecycle, Status},
    layer::{Layer, MOST_BELOW},
    snapshot::{External, ExternalDisk, Quiesce, Snapshot},
    storage::{Volume, VolumeOwner},
};
use serde::{Deserialize, Serialize};
use std::time::Duration;

const CALL: Duration = Duration::from_secs(120);

/// A disk that is to go on in a new layer.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct NewLayer {
    /// Its device.
    pub device: String,
    /// What the layer is called; chosen when absent.
    pub name: Option<String>,
}

/// Layers to be put over disks.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CreateLayers {
    /// The snapshot that is the record of the moment; none when absent.
    pub snapshot: Option<String>,
    /// User's text of it.
    pub note: String,
    /// Which disks; all that the guest writes to when absent.
    pub disks: Option<Vec<NewLayer>>,
    /// File systems inside are made still before: there are no layers without.
    pub quiesce: bool,
}

/// A name for a layer of which nobody said one.
fn named(volume: &Volume, snapshot: Option<&Name>) -> String {
    let owned = volume.owner != VolumeOwner::Custom;
    let own = if owned { format!("instances/{}", volume.name) } else { volume.name.clone() };
    match snapshot {
        Some(snapshot) => format!("{own}.{}", &**snapshot),
        None => format!("{own}.layer{}", volume.layers.made + 1),
    }
}

impl Engine {
    /// Lets disks of a virtual machine go on in new layers, all at one moment.
    ///
    /// # Errors
    /// Invalid by field, not found, conflict (busy, taken name, checkpoints, too many), unsupported for containers, shared and
    /// encrypted volumes and pools whose volumes are no files; forbidden.
    pub async fn layers_create(
        &self,
        context: &Context,
        project: &str,
        name: &str,
        request: CreateLayers,
    ) -> Result<LiveOperation> {
        let project = self.project(context, project, Permission::ResourceEdit)?;
        let inner = self.inner();
        restricted::check_snapshot(&ProjectRules::parse(&project.config)?)?;
        check_note(&request.note)?;
        runner::start::<LayersCreate>(inner, context, |tx| {
            let records = inner.inventory.read();
            let row = records.instance(&project, name)?;
            if row.kind != InstanceKind::VirtualMachine {
                let text = format!("instance {name:?} is a container; disks of virtual machines have layers");
                return Err(Error::unsupported(text));
            }
            tx.expect(row);
            tx.expect(&project);
            let runtime = records.runtimes.get(&row.id);
            let status = row.status(runtime.map(|r| &r.value));
            if row.lifecycle != Lifecycle::Ready || !(status.is_up() || status.is_down()) {
                return Err(Error::conflict(format!("instance {name:?} starts or ends; try again")));
            }
            if request.quiesce && status != Status::Running {
                let text = format!("instance {name:?} does not run: its file systems cannot be made still");
                return Err(Error::conflict(text).at("quiesce"));
            }
            if row.stateful {
                // What it goes on from was saved beside the disks as they were.
                let text = format!("instance {name:?} keeps its memory over its stop; start it first");
                return Err(Error::conflict(text));
            }
            let generation = runtime.map_or(row.generation, |r| r.generation);
            let guest = status.is_up().then_some(GuestRef { instance: row.id, generation });
            let now = inner.env.now();
            let snapshot = request.snapshot.as_deref().map(|s| Name::parse("name", s)).transpose()?;
            if let Some(wanted) = &snapshot
                && records.snapshots_of(row.id).iter().any(|s| s.name == *wanted)
            {
                let text = format!("instance {name:?} has a snapshot {:?} already", &**wanted);
                return Err(Error::conflict(text).at("name"));
            }
            let wanted: Option<Vec<String>> =
                request.disks.as_ref().map(|all| all.iter().map(|d| d.device.clone()).collect());
            let parsed = expand::parse_devices(&records.expanded(row).1)?;
            // As many as there are layers, for the file that a disk was made with is below as well.
            let mut below: usize = super::disks(&records, row)?.iter().map(|(_, v)| v.layers.all.len()).sum();
            let mut locks = vec![lock(row.id)];
            let (mut over, mut made, mut told) = (vec![], vec![], vec![]);
            for (device, volume) in chosen(&records, row, guest.is_some(), wanted.as_deref())? {
                let field = format!("disks.{device}");
                tx.expect(volume);
                crate::checkpoints::demand_none(
                    &records,
                    volume.id,
                    "which would know nothing of what is written to a layer",
                )?;
                if volume.is_shared() && volume.owner == VolumeOwner::Custom {
                    let text = format!(
                        "volume {:?} is shared, and others would not see what is in a layer",
                        volume.name
                    );
                    return Err(Error::unsupported(text).at(field));
                }
                let pool = records.pools.get(&volume.pool);
                let pool = pool.ok_or_else(|| Error::not_found("the pool of the disk is gone"))?;
                crate::storage::use_pool(tx, pool)?;
                let io = parsed.disks.iter().find(|(name, _)| *name == device).map(|(_, disk)| disk.io);
                if crate::keys::is_encrypted(volume, &io.unwrap_or(parsed.root.1.io)) {
                    let text = format!(
                        "volume {:?} is encrypted, and has no layers: QEMU would write what it decrypted; take a snapshot instead",
                        volume.name
                    );
                    return Err(Error::unsupported(text).at(field));
                }
                below += 1;
                if below > MOST_BELOW {
                    let text = format!(
                        "the disks of instance {name:?} have {MOST_BELOW} layers in all already, and a machine can have no more; \
                         merge some (commit or pull) first"
                    );
                    return Err(Error::conflict(text).at(field));
                }
                if pool.kind.has_names() {
                    return Err(Error::unsupported(format!(
                        "pool {:?} is of kind {}, whose volumes are no files and have no layers; those of kind dir and btrfs can; take a \
                         snapshot instead",
                        &*pool.name,
                        pool.kind.as_str()
                    ))
                    .at(field));
                }
                let others = volumes::attached(&records, volume);
                if let Some(other) = others.iter().find(|i| i.id != row.id) {
                    let text = format!(
                        "volume {:?} is attached to instance {:?} as well",
                        volume.name, &*other.name
                    );
                    return Err(Error::conflict(text).at(field));
                }
                let said = request.disks.iter().flatten().find(|d| d.device == device);
                let layer = said.and_then(|d| d.name.clone());
                let layer = layer.unwrap_or_else(|| named(volume, snapshot.as_ref()));
                let number = volume.layers.clone().add(&field, &layer, now)?;
                over.push(LayerOver { volume: VolumeRef { pool: volume.pool, volume: volume.id }, number });
                told.push(ExternalDisk { device, pool: pool.name.to_string(), layer: layer.clone() });
                made.push((volume.id, Layer { number, name: layer, created_at: now }));
                if volume.owner == VolumeOwner::Custom {
                    locks.push(volumes::lock(volume.id));
                }
            }
            locks.sort();
            locks.dedup();
            let snapshot = snapshot.map(|name| {
                Box::new(Snapshot {
                    id: SnapshotId(inner.env.uuid()),
                    instance: row.id,
                    name,
                    parent: row.current_snapshot,
                    description: row.description.clone(),
                    note: request.note.clone(),
                    ephemeral: row.ephemeral,
                    profiles: row.profiles.clone(),
                    config: row.config.clone(),
                    devices: row.devices.clone(),
                    hardware: row.hardware.clone(),
                    volumes: vec![],
                    stateful: false,
                    created_at: now,
                    expires_at: None,
                    scheduled: false,
                    spec_version: 1,
                    external: Some(External { disks: told, running: guest.is_some() }),
                })
            });
            let quiesce = guest.filter(|_| request.quiesce);
            let guests = quiesce.map(|at| PausedGuest { at, node: row.node, quiesce: Quiesce::Require });
            let path = path(&project.name, name);
            let plan = LayersPlan {
                request: MachineLayersAdd { instance: row.id, guest, layers: over },
                made,
                snapshot,
                guests: guests.into_iter().collect(),
                locks,
                node: row.node,
                path: path.clone(),
            };
            Ok((plan, NewOperation::task("Adding layers to disks", Some(project.id), "instances", path)))
        })
        .await
    }
}

/// Plan of [`LayersCreate`].
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct LayersPlan {
    request: MachineLayersAdd,
    /// What the volumes have then.
    made: Vec<(VolumeId, Layer)>,
    snapshot: Option<Box<Snapshot>>,
    /// Whose file systems are made still.
    guests: Vec<PausedGuest>,
    locks: Vec<String>,
    node: NodeId,
    path: String,
}

/// Outputs of [`LayersCreate`].
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct LayersOutputs {
    resumed: Vec<Observed>,
}

impl LayersPlan {
    fn taken(&self) -> Option<Taken> {
        self.snapshot.clone().map(|snapshot| Taken::Instance { snapshot })
    }

    /// Lets the records of the volumes have the layers; done already when they do.
    fn write(&self, records: &Records, tx: &mut Tx) -> Result<()> {
        for (id, layer) in &self.made {
            let row = records.volumes.get(id).ok_or_else(|| Error::not_found("the volume is gone"))?;
            if row.layers.all.iter().any(|l| l.number == layer.number) {
                continue;
            }
            let mut volume = row.value.clone();
            volume.layers.made = volume.layers.made.max(layer.number);
            volume.layers.all.push(layer.clone());
            tx.replace(row, &volume);
        }
        Ok(())
    }
}

/// Makes file systems still where that is asked for, lets the disks go on in the layers at one moment, then the records say so.
pub struct LayersCreate;

#[async_trait]
impl Saga for LayersCreate {
    const NAME: &'static str = "layers-create";
    const STEPS: &'static [&'static str] = &["still", "layers", "resume"];
    type Plan = LayersPlan;
    type Outputs = LayersOutputs;

    fn has(plan: &LayersPlan, step: usize) -> bool {
        step == 1 || !plan.guests.is_empty()
    }
    // Once a guest may have gone on in a layer there is nothing to go back to but a merge.
    fn retries(step: usize) -> u32 {
        if step >= 1 { 5 } else { 0 }
    }
    fn locks(plan: &LayersPlan) -> Vec<String> {
        plan.locks.clone()
    }
    fn begin(plan: &LayersPlan, _: &EngineInner, tx: &mut Tx) -> Result<()> {
        if let Some(taken) = plan.taken() {
            taken.take_name(tx);
        }
        Ok(())
    }
    async fn run(
        cx: &StepContext,
        plan: &LayersPlan,
        outputs: &mut LayersOutputs,
        step: usize,
    ) -> Result<()> {
        match step {
            0 => pause(cx, &plan.guests).await.map(drop),
            1 => cx.agent(plan.node)?.machine_layers_add(&cx.mutate(CALL), plan.request.clone()).await,
            _ => {
                outputs.resumed = resume(cx, &plan.guests).await?;
                Ok(())
            }
        }
    }
    async fn undo(cx: &StepContext, plan: &LayersPlan, _: &LayersOutputs, step: usize) -> Result<()> {
        match step {
            0 => release(cx, &plan.guests).await,
            1 => {
                let agent = cx.agent(plan.node)?;
                let stay = agent.machine_layers_take_back(&cx.mutate(CALL), plan.request.clone()).await?;
                if stay {
                    // What the guest writes is in them alone: nothing leads back but a merge.
                    cx.engine.transact(|records, tx| plan.write(records, tx)).await?;
                }
                Ok(())
            }
            _ => Ok(()),
        }
    }
    fn commit(plan: &LayersPlan, outputs: &LayersOutputs, engine: &EngineInner, tx: &mut Tx) -> Result<()> {
        let records = engine.inventory.read();
        plan.write(&records, tx)?;
        let row = records.instances.get(&plan.request.instance);
        let row = row.ok_or_else(|| Error::not_found("the instance is gone"))?;
        let mut instance = row.value.clone();
        if let Some(snapshot) = &plan.snapshot {
            tx.create(&**snapshot);
            instance.current_snapshot = Some(snapshot.id);
        }
        // It is written in any case: whoever has decided meanwhile, by disks without layers, decides anew.
        tx.replace(row, &instance);
        engine.note_resumed(&records, &outputs.resumed, tx);
        Ok(())
    }
    fn abort(plan: &LayersPlan, _: &LayersOutputs, _: &EngineInner, tx: &mut Tx) -> Result<()> {
        if let Some(taken) = plan.taken() {
            taken.release_name(tx);
        }
        Ok(())
    }
    fn announce(plan: &LayersPlan) -> Vec<(&'static str, String)> {
        vec![("instance-updated", plan.path.clone())]
    }
}
