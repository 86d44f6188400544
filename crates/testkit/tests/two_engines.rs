//! Two engines on one store, each with its own host, in one seeded world: names are taken once, partitions from the store
//! and crashes in mid-saga heal, and an executor that wakes up after its successor took over can do nothing any more.
//!
//! `KARST_SEEDS=1000` runs that many seeds instead of 30. Over 30 and more, the cuts must have found every step of the saga
//! that they are to land in.

use karst_agent::{
    CallContext, Fence, HostAgent,
    simulated::{Fault, SimulatedAgent, SimulatedOptions},
};
use karst_engine::{
    Context, Engine, LiveOperation,
    compute::create::CreateInstance,
    saga::{Phase, SagaRecord, registry},
};
use karst_env::{Cut, Env, EnvExt, SeededEnv};
use karst_model::{
    ErrorKind, NodeId, SagaId, access::Principal, instance::Lifecycle, operation::OperationState,
    spec::PoolSpec,
};
use karst_store::{FaultStore, ROOT, SqliteStore, Store, Table, list_prefix};
use karst_testkit::{
    scenarios::container,
    world::{self, DAEMON_ID},
};
use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

/// How many seeds run; with as many, every step of a saga is cut into.
const SEEDS: u64 = 30;

fn seeds() -> std::ops::Range<u64> {
    let n = std::env::var("KARST_SEEDS").ok().and_then(|s| s.parse().ok());
    0..n.unwrap_or(SEEDS)
}

/// Where the cut of each seed found the creation in the store: the step that its log was at. `None`: it had not begun there,
/// or was over.
type Landed = Arc<Mutex<Vec<Option<usize>>>>;

/// The saga that the cuts are to land in.
const CREATION: &str = "instance-create";

struct Side {
    /// Name of the process: its tasks and its end of the link to the store.
    process: String,
    node: NodeId,
    agent: Arc<SimulatedAgent>,
    engine: Engine,
}

struct Pair {
    env: SeededEnv,
    store: Arc<dyn Store>,
    admin: Context,
    a: Side,
    b: Side,
    landed: Landed,
}

async fn engine(
    env: &SeededEnv,
    store: &Arc<dyn Store>,
    process: &str,
    node: NodeId,
    agent: &Arc<SimulatedAgent>,
) -> Engine {
    let inside = env.node(process);
    let over: Arc<dyn Store> =
        Arc::new(FaultStore::over_link(store.clone(), inside.shared(), process, "store"));
    world::open(&inside, &over, agent, node).await.expect("an engine")
}

async fn side(env: &SeededEnv, store: &Arc<dyn Store>, process: &str, node: u128) -> Side {
    let options = SimulatedOptions {
        name: format!("host-{process}"),
        daemon_id: Some(DAEMON_ID.into()),
        latency: (Duration::from_millis(1), Duration::from_millis(20)),
        ..Default::default()
    };
    let agent = SimulatedAgent::new(env.shared(), options);
    let node = NodeId(uuid::Uuid::from_u128(node));
    let engine = engine(env, store, process, node, &agent).await;
    Side { process: process.into(), node, agent, engine }
}

impl Pair {
    async fn new(env: &SeededEnv, landed: Landed) -> Self {
        env.partition().set_latency(Duration::from_micros(50), Duration::from_millis(3));
        let store: Arc<dyn Store> = Arc::new(SqliteStore::memory(env.shared()).unwrap());
        let a = side(env, &store, "a", 7).await;
        a.engine.bootstrap().await.unwrap();
        let b = side(env, &store, "b", 8).await;
        // Pools are made on the node that is asked; the same pool on the other one, as an administrator would.
        let id = a.engine.inner().inventory.read().pool("default").unwrap().id;
        let fence = Fence {
            saga: SagaId(uuid::Uuid::nil()),
            executor: b.node,
            epoch: b.engine.inner().epoch,
            step: 0,
        };
        let spec = PoolSpec::own(id, a.engine.inner().inventory.read().pool("default").unwrap().kind);
        b.agent.pool_ensure(&CallContext::mutate(Duration::from_secs(9), fence), spec).await.unwrap();
        let admin = Context::new(Principal::unix_admin(0, 0, 1));
        Self { env: env.clone(), store, admin, a, b, landed }
    }

    /// Notes how far the creation is in the store, where what comes next cuts its executor off.
    async fn note_landing(&self) {
        let (sagas, _) = Table::<SagaRecord>::new().list(&*self.store).await.unwrap();
        let step = sagas.iter().find(|saga| saga.name == CREATION).map(|saga| match &saga.phase {
            Phase::Forward { next } => *next,
            other => panic!("nothing has failed yet: {other:?}"),
        });
        self.landed.lock().unwrap().push(step);
    }

    fn cut(&self, side: &Side, how: Cut) {
        self.env.partition().cut(&side.process, "store", how);
    }

    fn heal(&self, side: &Side) {
        self.env.partition().heal(&side.process, "store");
    }

    /// Waits until no saga is left and both inventories show the same, at most an hour of virtual time.
    async fn settle(&self) {
        for _ in 0..36_000 {
            self.env.sleep(Duration::from_millis(100)).await;
            let (sagas, _) = list_prefix(&*self.store, &Table::<SagaRecord>::new().prefix()).await.unwrap();
            if sagas.is_empty() {
                self.env.sleep(Duration::from_secs(40)).await;
                return;
            }
        }
        let (sagas, _) = list_prefix(&*self.store, &Table::<SagaRecord>::new().prefix()).await.unwrap();
        panic!("sagas do not end: {sagas:#?}");
    }

    async fn demand_clean(&self, title: &str) {
        self.settle().await;
        let agents = [&*self.a.agent, &*self.b.agent];
        // Networks are on both hosts, in any number: compared as a set.
        for engine in [&self.a.engine, &self.b.engine] {
            let faults = world::faults(engine, &*self.store, &agents).await;
            assert!(faults.is_empty(), "{title}: {faults:#?}");
        }
        let (one, two) = (world::fingerprint(&self.a.engine), world::fingerprint(&self.b.engine));
        assert_eq!(one, two, "{title}: the inventories differ");
        let (kvs, _) = list_prefix(&*self.store, ROOT).await.unwrap();
        for engine in [&self.a.engine, &self.b.engine] {
            let records = engine.inner().inventory.read();
            let stored = kvs.iter().filter(|kv| kv.key.starts_with("/karst/v1/instances/")).count();
            assert_eq!(records.instances.len(), stored, "{title}");
            for kv in kvs.iter().filter(|kv| kv.key.starts_with("/karst/v1/instances/")) {
                let id = kv.key.rsplit('/').next().unwrap().parse().unwrap();
                assert_eq!(records.instances[&id].mod_revision, kv.mod_revision, "{title}: {}", kv.key);
            }
        }
    }
}

async fn ended(env: &SeededEnv, operation: &LiveOperation) -> OperationState {
    let record = env.timeout(Duration::from_secs(3600), operation.ended()).await;
    record.expect("the operation ends").state
}

/// Runs a scenario under a seed; answers the digest of the way it went.
fn under<F: Future<Output = ()> + Send + 'static>(seed: u64, body: fn(Pair) -> F, landed: &Landed) -> u64 {
    let env = SeededEnv::new(seed);
    env.block_on({
        let (env, landed) = (env.clone(), landed.clone());
        async move { body(Pair::new(&env, landed).await).await }
    });
    env.trace_digest()
}

/// Every seed has noted where its cut landed, and all of them together have cut into each step of the creation: a saga that has
/// become quicker, or a longer way to it, does not make the scenario pass for nothing.
fn demand_every_step(landed: &Landed) {
    let landed = landed.lock().unwrap();
    assert_eq!(landed.len(), seeds().count(), "one cut a seed");
    if seeds().end < SEEDS {
        return;
    }
    let saga = registry().iter().find(|saga| saga.name() == CREATION).expect("it is registered");
    for (n, step) in saga.steps().iter().enumerate() {
        assert!(landed.contains(&Some(n)), "no seed cut into the step {step} of {CREATION}: {landed:?}");
    }
}

/// Eight creations on both engines of three names at once: each name is taken once, and who won sees it at once.
async fn same_names(p: Pair) {
    let p = Arc::new(p);
    let wins = Arc::new(Mutex::new(vec![0; 3]));
    let mut tasks = vec![];
    for n in 0..8usize {
        let (p, wins) = (p.clone(), wins.clone());
        tasks.push(p.env.clone().spawn_task("client", async move {
            let side = if n % 2 == 0 { &p.a } else { &p.b };
            p.env.sleep(Duration::from_micros(p.env.below(4000))).await;
            let which = n % 3;
            let name = format!("x{which}");
            match side.engine.instance_create(&p.admin, "default", container(&name)).await {
                Ok((_, operation)) => {
                    wins.lock().unwrap()[which] += 1;
                    side.engine.instance(&p.admin, "default", &name).expect("who was answered sees it");
                    assert_eq!(ended(&p.env, &operation).await, OperationState::Success);
                    let view = side.engine.instance(&p.admin, "default", &name).unwrap();
                    assert_eq!(view.instance.lifecycle, Lifecycle::Ready, "and its end too");
                }
                Err(e) => {
                    assert_eq!((e.kind, e.field.as_deref()), (ErrorKind::Conflict, Some("name")), "{e:?}");
                }
            }
        }));
    }
    for task in tasks {
        task.join().await.unwrap();
    }
    assert_eq!(*wins.lock().unwrap(), [1, 1, 1], "each name is taken exactly once");
    p.demand_clean("same names").await;
}

/// The VMIDs that one engine gave are known to the other, also many of them and those that came back.
async fn vmids(p: Pair) {
    let mut seen = vec![];
    for n in 0..40 {
        let side = if n < 30 { &p.a } else { &p.b };
        let name = format!("v{n}");
        let (_, operation) =
            side.engine.instance_create(&p.admin, "default", container(&name)).await.unwrap();
        assert_eq!(ended(&p.env, &operation).await, OperationState::Success);
        seen.push(side.engine.instance(&p.admin, "default", &name).unwrap().instance.vmid.0);
        if n % 5 == 4 {
            let operation = side.engine.instance_delete(&p.admin, "default", &name).await.unwrap();
            ended(&p.env, &operation).await;
        }
    }
    let mut once = seen.clone();
    once.sort_unstable();
    once.dedup();
    assert_eq!(once.len(), seen.len(), "{seen:?}");
    p.demand_clean("vmids").await;
}

/// Engine A loses the store in mid-saga; B goes on, and wants the same name. A heals.
async fn partition(p: Pair) {
    let p = Arc::new(p);
    let how = match p.env.below(2) {
        0 => Cut::Refuse,
        _ => Cut::Hang(Duration::from_secs(3)),
    };
    let shared = p.clone();
    let creating = p.env.spawn_task("client-a", async move {
        let p = shared;
        let request = CreateInstance { start: true, ..container("x") };
        // While the store is away the answer may be that nobody knows.
        if let Ok((_, operation)) = p.a.engine.instance_create(&p.admin, "default", request).await {
            let state = ended(&p.env, &operation).await;
            assert_eq!(state, OperationState::Success, "{:?}", operation.snapshot());
        }
    });
    p.env.sleep(Duration::from_micros(p.env.below(40_000))).await;
    p.note_landing().await;
    p.cut(&p.a, how);
    p.env.sleep(Duration::from_millis(p.env.below(5000))).await;
    let other = p.b.engine.instance_create(&p.admin, "default", container("x")).await;
    let own = p.b.engine.instance_create(&p.admin, "default", container("y")).await.expect("B has the store");
    assert_eq!(ended(&p.env, &own.1).await, OperationState::Success);
    if let Ok((_, operation)) = other {
        ended(&p.env, &operation).await;
    }
    p.env.sleep(Duration::from_millis(p.env.below(50_000))).await;
    p.heal(&p.a);
    creating.join().await.unwrap();
    p.demand_clean("partition").await;
    let both = p.a.engine.instances(&p.admin, "default").unwrap();
    assert_eq!(both.iter().map(|v| v.instance.name.to_string()).collect::<Vec<_>>(), ["x", "y"]);
}

/// Engine A is killed in mid-saga; another of the same node takes its sagas up.
async fn crash(mut p: Pair) {
    let request = CreateInstance { start: true, ..container("x") };
    let (a, admin) = (p.a.engine.clone(), p.admin.clone());
    let client = p.env.node("a").spawn_task("client-a", async move {
        // It dies with the engine.
        let _ = a.instance_create(&admin, "default", request).await;
    });
    drop(client);
    p.env.sleep(Duration::from_micros(p.env.below(60_000))).await;
    p.note_landing().await;
    p.env.crash_node("a");
    p.env.sleep(Duration::from_millis(p.env.below(3000))).await;
    p.a.process = "a2".into();
    p.a.engine = engine(&p.env, &p.store, "a2", p.a.node, &p.a.agent).await;
    p.demand_clean("crash").await;
    // What was begun is finished; what was not is not there.
    let all = p.a.engine.instances(&p.admin, "default").unwrap();
    assert!(all.len() <= 1);
}

/// Engine A falls asleep in a call and away from the store; its successor takes over and is slow as well. A wakes up in the
/// middle of that: its call and its log writes are refused.
async fn paused(mut p: Pair) {
    let volumes = |p: &Pair| p.a.engine.inner().inventory.read().volumes.len();
    p.a.agent.inject("volume_create", Fault::Delay(Duration::from_secs(20)));
    p.a.agent.inject("volume_create", Fault::Delay(Duration::from_secs(60)));
    let request = CreateInstance { start: true, ..container("x") };
    let (_, sleeping) = p.a.engine.instance_create(&p.admin, "default", request).await.unwrap();
    let deaf = p.env.below(2) == 0;
    if deaf {
        p.cut(&p.a, Cut::Hang(Duration::from_secs(300)));
    }
    p.env.sleep(Duration::from_secs(1)).await;
    let process = p.a.process.clone();
    let old = std::mem::replace(&mut p.a.engine, engine(&p.env, &p.store, "a2", p.a.node, &p.a.agent).await);
    p.a.process = "a2".into();
    // The old one's store comes back around the moment at which its call does.
    p.env.sleep(Duration::from_millis(17_000 + p.env.below(4000))).await;
    p.env.partition().heal(&process, "store");
    // Both have their call behind them or in front of them; the log is the successor's alone.
    p.env.sleep(Duration::from_secs(20)).await;
    let (sagas, _) = Table::<SagaRecord>::new().list(&*p.store).await.unwrap();
    assert_eq!(sagas.len(), 1, "the successor is still at it");
    assert_eq!((sagas[0].epoch, &sagas[0].phase), (p.a.engine.inner().epoch, &Phase::Forward { next: 0 }));
    p.settle().await;
    let record = p.a.engine.operation(&p.admin, sleeping.id()).unwrap();
    assert_eq!((record.state, &record.error), (OperationState::Success, &None));
    assert_eq!(p.a.agent.faults_left(), 0, "both calls were delayed");
    assert_eq!(volumes(&p), 1);
    let view = p.a.engine.instance(&p.admin, "default", "x").unwrap();
    assert_eq!(view.instance.generation.n, 1, "started once");
    assert!(p.a.agent.guard().highest(p.a.node) > old.inner().epoch);
    // Whatever the old one still tries is refused by the store.
    let late = old.instance_create(&p.admin, "default", container("late")).await;
    assert_eq!(late.map(drop).unwrap_err().kind, ErrorKind::Conflict);
    old.profile_create(&p.admin, "default", "late", Default::default()).await.unwrap_err();
    old.close();
    p.demand_clean("paused").await;
}

/// Two engines of different nodes work on one host at the same time, the one that was opened earlier too: the host follows
/// both.
async fn one_host(p: Pair) {
    let p = Arc::new(p);
    let c = engine(&p.env, &p.store, "c", NodeId(uuid::Uuid::from_u128(9)), &p.a.agent).await;
    let mut tasks = vec![];
    for n in 0..6usize {
        let (p, c) = (p.clone(), c.clone());
        tasks.push(p.env.clone().spawn_task("client", async move {
            let engine = if n % 2 == 0 { &p.a.engine } else { &c };
            p.env.sleep(Duration::from_micros(p.env.below(200_000))).await;
            let request = CreateInstance { start: true, ..container(&format!("s{n}")) };
            let (_, operation) = engine.instance_create(&p.admin, "default", request).await.unwrap();
            let state = ended(&p.env, &operation).await;
            assert_eq!(state, OperationState::Success, "{:?}", operation.snapshot());
        }));
    }
    for task in tasks {
        task.join().await.unwrap();
    }
    let guard = p.a.agent.guard();
    let (mine, theirs) = (p.a.engine.inner(), c.inner());
    assert!(mine.epoch < theirs.epoch);
    assert_eq!([guard.highest(mine.node), guard.highest(theirs.node)], [mine.epoch, theirs.epoch]);
    c.close();
    p.demand_clean("one host").await;
}

macro_rules! scenarios {
    ($($name:ident => $body:ident $(, then $demand:ident)?;)+) => {
        $( #[test]
        fn $name() {
            let landed = Landed::default();
            for seed in seeds() {
                println!("seed {seed}");
                under(seed, $body, &landed);
            }
            $( $demand(&landed); )?
        } )+

        #[test]
        fn the_same_seed_goes_the_same_way() {
            let landed = Landed::default();
            $( let digests = [under(4, $body, &landed), under(4, $body, &landed)];
assert_eq!(digests[0], digests[1], stringify!($name));
            assert_ne!(digests[0], under(5, $body, &landed), stringify!($name)); )+
        }
    };
}

scenarios! {
    each_name_is_taken_once => same_names;
    no_vmid_is_given_twice => vmids;
    a_partition_from_the_store_heals => partition, then demand_every_step;
    a_successor_finishes_what_a_crash_left => crash, then demand_every_step;
    who_wakes_up_after_its_successor_does_nothing => paused;
    a_host_follows_the_engines_of_several_nodes => one_host;
}
