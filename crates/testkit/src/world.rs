//! A platform in one seeded world: an engine over an in-memory store and a simulated host.

use karst_agent::{
    CallContext, HostAgent, SelfCheck, VolumeRef,
    simulated::{SimulatedAgent, SimulatedOptions},
};
use karst_engine::{Agents, Context, Engine, EngineConfig, LiveOperation};
use karst_env::{Env, EnvExt, SeededEnv};
use karst_model::{
    NodeId, PoolId, Result,
    access::Principal,
    instance::{Lifecycle, RuntimeState},
    operation::Operation,
    storage::{PoolKind, Volume, VolumeContent},
    uplink::NetworkKind,
};
use karst_store::{SqliteStore, Store, list_prefix};
use std::{collections::BTreeSet, sync::Arc, time::Duration};

/// A platform that can be crashed and opened again over what it left.
pub struct World {
    /// Time, randomness, tasks.
    pub env: SeededEnv,
    /// The store survives crashes of the engine.
    pub store: Arc<dyn Store>,
    /// So does the host.
    pub agent: Arc<SimulatedAgent>,
    /// The engine of now.
    pub engine: Engine,
    /// An administrator.
    pub admin: Context,
    node: NodeId,
}

/// Short id of the simulated daemon.
pub const DAEMON_ID: &str = "5eed00";

/// An engine for `node` over a store and one simulated host.
///
/// # Errors
/// Those of the engine.
pub async fn open(
    env: &SeededEnv,
    store: &Arc<dyn Store>,
    agent: &Arc<SimulatedAgent>,
    node: NodeId,
) -> Result<Engine> {
    let name = format!("node{}", node.0.as_u128().saturating_sub(6));
    open_named(env, store, agent, node, name).await
}

async fn open_named(
    env: &SeededEnv,
    store: &Arc<dyn Store>,
    agent: &Arc<SimulatedAgent>,
    node: NodeId,
    name: String,
) -> Result<Engine> {
    let agents = Agents::default();
    agents.insert(node, agent.clone());
    Engine::open(EngineConfig {
        env: env.shared(),
        store: store.clone(),
        agents,
        nodes: vec![(node, name)],
        daemon_id: DAEMON_ID.into(),
    })
    .await
}

impl World {
    /// A fresh platform, bootstrapped: a pool, a network, the default profile.
    pub async fn new(env: &SeededEnv) -> Result<Self> {
        Self::with(env, SimulatedOptions::default()).await
    }

    /// The same over a host with `options`.
    ///
    /// # Errors
    /// Those of the engine.
    pub async fn with(env: &SeededEnv, options: SimulatedOptions) -> Result<Self> {
        let store: Arc<dyn Store> = Arc::new(SqliteStore::memory(env.shared())?);
        let options = SimulatedOptions { daemon_id: Some(DAEMON_ID.into()), ..options };
        let agent = SimulatedAgent::new(env.shared(), options);
        let node = NodeId(uuid::Uuid::from_u128(7));
        let engine = open(env, &store, &agent, node).await?;
        engine.bootstrap().await?;
        let world = Self {
            env: env.clone(),
            store,
            agent,
            engine,
            admin: Context::new(Principal::unix_admin(0, 0, 1)),
            node,
        };
        world.settle().await;
        Ok(world)
    }

    /// The engine dies and another one opens what it left.
    pub async fn reopen(&mut self) -> Result<()> {
        self.engine.set_hook(None);
        self.engine.close();
        self.engine = open(&self.env, &self.store, &self.agent, self.node).await?;
        Ok(())
    }

    /// The same on a host that was given another name meanwhile.
    ///
    /// # Errors
    /// Those of the engine.
    pub async fn reopen_named(&mut self, name: &str) -> Result<()> {
        self.engine.set_hook(None);
        self.engine.close();
        self.engine = open_named(&self.env, &self.store, &self.agent, self.node, name.to_owned()).await?;
        Ok(())
    }

    /// Waits until every saga has ended or needs attention, and the reconcilers have seen it; at most ten minutes of
    /// virtual time.
    pub async fn settle(&self) {
        for _ in 0..6000 {
            let idle = {
                let records = self.engine.inner().inventory.read();
                records
                    .sagas
                    .values()
                    .all(|s| matches!(s.phase, karst_engine::saga::Phase::NeedsAttention { .. }))
            };
            self.env.sleep(Duration::from_millis(100)).await;
            if idle {
                // Reconcilers gather changes for some hundred milliseconds.
                self.env.sleep(Duration::from_secs(2)).await;
                return;
            }
        }
        panic!("sagas do not end");
    }

    /// Waits for an operation, at most a virtual hour.
    pub async fn ended(&self, operation: LiveOperation) -> Arc<Operation> {
        self.env.timeout(Duration::from_secs(3600), operation.ended()).await.expect("the operation ends")
    }

    /// [`faults`] of this world.
    pub async fn faults(&self) -> Vec<String> {
        faults(&self.engine, &*self.store, &[&self.agent]).await
    }

    /// [`fingerprint`] of this world.
    pub fn fingerprint(&self) -> String {
        fingerprint(&self.engine)
    }

    /// The host as the trait that the engine sees.
    pub fn host(&self) -> &dyn HostAgent {
        &*self.agent
    }

    /// The environment as the trait that the engine sees.
    pub fn shared_env(&self) -> Arc<dyn Env> {
        self.env.shared()
    }
}

/// Everything that is wrong: a saga or lock left behind, a name that leads nowhere, a thing on the host that no record
/// knows, a record whose thing is missing.
pub async fn faults(engine: &Engine, store: &dyn Store, agents: &[&SimulatedAgent]) -> Vec<String> {
    let mut faults = vec![];
    let mut check = SelfCheck::default();
    for agent in agents {
        let one =
            agent.self_check(&CallContext::read(Duration::from_secs(10)), ()).await.expect("self check");
        let staged =
            agent.image_staged(&CallContext::read(Duration::from_secs(10)), ()).await.expect("staged");
        faults.extend(staged.iter().map(|i| format!("parts of image {i} are staged")));
        faults.extend(one.leaks.iter().map(|l| format!("the host says: {l}")));
        check.volumes.extend(one.volumes);
        check.snapshots.extend(one.snapshots);
        check.backups.extend(one.backups);
        check.images.extend(one.images);
        check.networks.extend(one.networks);
        check.guests.extend(one.guests);
        check.machine_states.extend(one.machine_states);
    }
    for (volume, size) in limits(engine) {
        for agent in agents {
            let said = agent.volume_usage(&CallContext::read(Duration::from_secs(10)), volume).await;
            // A host that does not have it says so.
            if let Ok(usage) = said
                && usage.total != size
            {
                faults.push(format!(
                    "tree {} is limited to {}, and recorded with {size}",
                    volume.volume, usage.total
                ));
            }
        }
    }
    let (kvs, _) = list_prefix(store, karst_store::ROOT).await.expect("list");
    let keys: Vec<(String, String)> =
        kvs.iter().map(|kv| (kv.key.clone(), String::from_utf8_lossy(&kv.value).into_owned())).collect();
    let count =
        |table: &str| keys.iter().filter(|(k, _)| k.starts_with(&format!("/karst/v1/{table}/"))).count();
    for table in ["sagas", "locks", "cleanup"] {
        if count(table) > 0 {
            faults.push(format!("{} records are left in {table}", count(table)));
        }
    }
    for (key, id) in keys.iter().filter(|(k, _)| k.starts_with("/karst/v1/index/")) {
        let table = key.split('/').nth(4).unwrap_or_default();
        let table = if table == "vmids" { "instances" } else { table };
        // Names of these are below words of the API.
        let table = match table {
            "network-acls" => "network_acls",
            "network-address-sets" => "address_sets",
            // An address is taken by the network that listens at it.
            "network-forwards" => "networks",
            // A use is taken by the secret that has it.
            "secret-uses" => "secrets",
            other => other,
        };
        let below = format!("/karst/v1/{table}/");
        let record = |k: &str| k.starts_with(&below) && k.ends_with(id.as_str());
        if !keys.iter().any(|(k, _)| record(k)) {
            faults.push(format!("the name {key} leads nowhere"));
        }
    }
    let records = engine.inner().inventory.read();
    fn compare<T: Ord + Copy + std::fmt::Display>(
        what: &str,
        host: &[T],
        ours: impl Iterator<Item = T>,
        faults: &mut Vec<String>,
    ) {
        let host: BTreeSet<T> = host.iter().copied().collect();
        let ours: BTreeSet<T> = ours.collect();
        faults
            .extend(host.difference(&ours).map(|x| format!("the host has {what} {x} that no record knows")));
        faults.extend(ours.difference(&host).map(|x| format!("{what} {x} is recorded, but not on the host")));
    }
    compare("volume", &check.volumes, records.volumes.keys().copied(), &mut faults);
    compare("backup", &check.backups, records.backups.keys().copied(), &mut faults);
    compare("image", &check.images, records.images.keys().copied(), &mut faults);
    let bridges =
        records.networks.values().filter(|n| n.kind == NetworkKind::Bridge && n.is_active()).map(|n| n.id);
    compare("network", &check.networks, bridges, &mut faults);
    let taken = records.snapshots.values().flat_map(|s| s.volumes.iter().copied());
    let taken = taken.chain(records.volume_snapshots.values().map(|s| (s.volume, s.id)));
    let taken: BTreeSet<_> = taken.collect();
    let kept: BTreeSet<_> = check.snapshots.iter().copied().collect();
    for (volume, id) in taken.symmetric_difference(&kept) {
        faults.push(format!("snapshot {id} of volume {volume} is known to one side only"));
    }
    for (instance, id) in &check.machine_states {
        if records.snapshots.get(id).is_none_or(|s| s.instance != *instance) {
            faults.push(format!("the host keeps a state {id} of machine {instance} that no record knows"));
        }
    }
    for guest in &check.guests {
        if !records.instances.contains_key(guest) {
            faults.push(format!("the host has guest {guest} that no record knows"));
        }
    }
    for instance in records.instances.values() {
        if instance.lifecycle != Lifecycle::Ready {
            faults.push(format!("instance {} is {:?}", &*instance.name, instance.lifecycle));
        }
        let runs = records.runtimes.get(&instance.id).is_some_and(|r| r.state == RuntimeState::Running);
        if runs && !check.guests.contains(&instance.id) {
            faults.push(format!("instance {} is said to run and does not", &*instance.name));
        }
        let of = records.runtimes.get(&instance.id).filter(|r| r.state == RuntimeState::Running);
        if let Some(runtime) = of.filter(|r| r.generation != instance.generation) {
            faults.push(format!(
                "instance {} runs as {:?}, and its record means {:?}",
                &*instance.name, runtime.generation, instance.generation
            ));
        }
    }
    for operation in records.operations.values().filter(|o| !o.state.is_final()) {
        faults.push(format!("operation {:?} has not ended", operation.description));
    }
    faults
}

/// Trees on btrfs with a limit, which their hosts must have as it is recorded.
fn limits(engine: &Engine) -> Vec<(VolumeRef, u64)> {
    let records = engine.inner().inventory.read();
    let btrfs = |id: PoolId| records.pools.get(&id).is_some_and(|p| p.kind == PoolKind::Btrfs);
    let trees = records.volumes.values();
    let trees = trees.filter(|v| v.content == VolumeContent::Filesystem && btrfs(v.pool));
    let limit = |v: &Volume| Some((VolumeRef { pool: v.pool, volume: v.id }, v.size?.bytes()));
    trees.filter_map(|v| limit(v)).collect()
}

/// What users have, without ids, times and counters: to compare the outcome of two ways.
pub fn fingerprint(engine: &Engine) -> String {
    let records = engine.inner().inventory.read();
    let mut lines = vec![];
    for i in records.instances.values() {
        let view = engine.inner().inventory.view(&records, i.id).expect("view");
        lines.push(format!(
            "instance {} {} {:?} {:?} {:?} {:?}",
            &*i.name, i.kind, view.status, i.power, i.config, i.devices
        ));
    }
    for s in records.snapshots.values() {
        let parent = s.parent.and_then(|p| records.snapshots.get(&p)).map(|p| p.name.to_string());
        let of = records.instances.get(&s.instance).map(|i| i.name.to_string());
        lines.push(format!("snapshot {} of {of:?} after {parent:?} {:?}", &*s.name, s.config));
    }
    for c in records.checkpoints.values() {
        let parent = c.parent.and_then(|p| records.checkpoints.get(&p)).map(|p| p.name.to_string());
        let of = records.instances.get(&c.instance).map(|i| i.name.to_string());
        lines.push(format!("checkpoint {} of {of:?} after {parent:?}", &*c.name));
    }
    lines.extend(records.volume_snapshots.values().map(|s| {
        let of = records.volumes.get(&s.volume).map(|v| v.name.clone());
        format!("snapshot {} of volume {of:?} {:?}", &*s.name, s.size)
    }));
    lines.extend(records.backups.values().map(|b| format!("backup {} {}", &*b.name, b.instance_only)));
    lines.extend(records.images.values().map(|i| format!("image {} {}", i.fingerprint, i.kind)));
    lines.extend(records.aliases().map(|a| format!("alias {}", a.name)));
    lines.extend(records.networks.values().map(|n| format!("network {} {:?}", &*n.name, n.config)));
    lines.extend(records.pools.values().map(|p| format!("pool {} {:?}", &*p.name, p.config)));
    lines.extend(records.volumes.values().map(|v| {
        let layers: Vec<_> = v.layers.all.iter().map(|l| (l.number, l.name.as_str())).collect();
        format!("volume {} {:?} {:?} {layers:?}", v.name, v.content, v.size)
    }));
    lines.sort();
    lines.join("\n")
}
