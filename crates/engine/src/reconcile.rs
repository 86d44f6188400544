//! What follows the records without being asked: facts of hosts, observed runtimes, networks, ephemeral instances,
//! autostart, old operations. Each is a loop without inputs, woken by changes and by a timer.

use crate::{
    Engine, EngineInner,
    autostart::Starts,
    context::Context,
    db::Tx,
    events::{DISK_THRESHOLD, Event, EventKind, Subject},
    saga::Phase,
};
use karst_agent::{AgentEvent, CallContext, HostAgent};
use karst_env::{EnvExt, TaskHandle};
use karst_model::{
    InstanceId, NetworkId, NodeId, Result,
    guest::{Observed, ThresholdReached},
    instance::{DesiredPower, ExitReason, Lifecycle, RuntimeState},
    keys,
    network::Network,
    news::MachineNews,
    node::{Node, Starting},
    operation::OperationState,
    spec::NetworkSpec,
    uplink::NetworkKind,
};
use karst_store::Revision;
use serde_json::json;
use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::{Arc, Weak},
    time::Duration,
};

/// How often everything is looked at even when nothing was announced.
const SWEEP: Duration = Duration::from_secs(30);
/// When to look again at what could not be done.
const SOON: Duration = Duration::from_secs(1);
/// How often it is looked what became of starts that are under way.
const TICK: Duration = Duration::from_millis(100);
/// Ended operations that the store keeps.
const OPERATIONS_KEPT: usize = 200;

/// How a guest ended that the restart of its host took along.
pub(crate) const HOST_RESTARTED: &str = "the host was restarted";

/// Starts all reconcilers; they end with the engine.
pub(crate) fn spawn_all(inner: &Arc<EngineInner>) -> Vec<TaskHandle> {
    let mut tasks = vec![];
    for (node, agent) in inner.agents.all() {
        let weak = Arc::downgrade(inner);
        tasks.push(inner.env.spawn_task("host-sync", host_sync(weak, node, agent)));
    }
    tasks.push(inner.env.spawn_task("warnings", crate::tenancy::warnings::reconciler(Arc::downgrade(inner))));
    tasks.push(inner.env.spawn_task("audit", crate::audit::writer(Arc::downgrade(inner))));
    tasks.push(inner.env.spawn_task("networks", networks(Arc::downgrade(inner))));
    let schedule = crate::snapshots::schedule::follow(Arc::downgrade(inner));
    tasks.push(inner.env.spawn_task("snapshots", schedule));
    tasks.push(inner.env.spawn_task("backups", crate::backups::follow(Arc::downgrade(inner))));
    tasks.push(inner.env.spawn_task("images", crate::images::remote::follow(Arc::downgrade(inner))));
    tasks.push(inner.env.spawn_task("cached-images", crate::images::remote::forget(Arc::downgrade(inner))));
    tasks.push(inner.env.spawn_task("restarts", crate::restarts::follow(Arc::downgrade(inner))));
    let describe = crate::recover::describe::follow(Arc::downgrade(inner));
    tasks.push(inner.env.spawn_task("descriptions", describe));
    tasks.push(inner.env.spawn_task("housekeeping", housekeeping(Arc::downgrade(inner))));
    tasks
}

/// Follows one host: its facts, and what it sees of its guests.
async fn host_sync(weak: Weak<EngineInner>, node: NodeId, agent: Arc<dyn HostAgent>) {
    let mut first = true;
    let mut restart = HostRestart::default();
    loop {
        let Some(inner) = weak.upgrade() else { return };
        let env = inner.env.clone();
        let events = agent.events().await;
        let synced = sync_once(&inner, node, &*agent, first, &mut restart).await;
        if let Err(e) = &synced {
            tracing::warn!(%node, error = %e, "the host does not say what it runs; trying again");
        }
        drop(inner);
        let (Ok(mut events), Ok(next)) = (events, synced) else {
            env.sleep(Duration::from_millis(500)).await;
            continue;
        };
        first = false;
        // The next look at the whole has its time, however many events come until then.
        let mut sweep = env.monotonic() + next;
        loop {
            let left = sweep.saturating_sub(env.monotonic());
            if left.is_zero() {
                break;
            }
            let tick = if restart.starts.are_under_way() { left.min(TICK) } else { left };
            let event = env.timeout(tick, events.recv()).await;
            let Some(inner) = weak.upgrade() else { return };
            if restart.starts.are_under_way() {
                restart.starts.go_on(&inner).await;
                if let Err(e) = note_left(&inner, node, &restart).await {
                    tracing::warn!(%node, error = %e, "what has started could not be recorded; trying again");
                    break;
                }
                if !restart.starts.are_under_way() {
                    sweep = sweep.min(env.monotonic() + SOON);
                }
            }
            match event {
                Ok(Some(AgentEvent::Guest { observed })) => match record(&inner, &observed, None).await {
                    Ok(true) => {}
                    Ok(false) => sweep = sweep.min(env.monotonic() + SOON),
                    Err(e) => {
                        tracing::warn!(%node, error = %e, "what a host saw could not be recorded; asking again for the whole");
                        break;
                    }
                },
                Ok(Some(AgentEvent::DiskThreshold { reached })) => tell_threshold(&inner, &reached),
                Ok(Some(AgentEvent::Machine { news })) => tell_news(&inner, &news),
                Ok(Some(AgentEvent::ImageProgress { .. })) => {}
                // Missed something, or lost the connection.
                Ok(Some(AgentEvent::Lost) | None) => break,
                // The head of the loop says whether it is time for a sweep.
                Err(_) => {}
            }
        }
    }
}

/// What was done about a restart of the host whose new boot is not recorded yet.
#[derive(Default)]
struct HostRestart {
    boot_id: String,
    starts: Starts,
    /// Some that an earlier daemon stopped with the platform are still to be started.
    rest: bool,
}

/// Looks at the whole of a host. Answers when to look again: soon when something could not be recorded now, because a saga
/// was at work there, or when instances are still to be started.
async fn sync_once(
    inner: &Arc<EngineInner>,
    node: NodeId,
    agent: &dyn HostAgent,
    first: bool,
    restart: &mut HostRestart,
) -> Result<Duration> {
    let context = CallContext::read(Duration::from_secs(20));
    let facts = agent.host_facts(&context, ()).await?;
    let rebooted = {
        let records = inner.inventory.read();
        let old = records.nodes.get(&node).and_then(|n| n.facts.as_ref());
        old.is_some_and(|o| o.boot_id != facts.boot_id)
    };
    let write_facts = async || {
        inner
            .transact(|records, tx| {
                if let Some(row) = records.nodes.get(&node)
                    && (row.facts.as_ref() != Some(&facts) || row.starting.is_some())
                {
                    let mut new = row.value.clone();
                    new.facts = Some(facts.clone());
                    new.starting = None;
                    tx.replace(row, &new);
                }
                Ok(())
            })
            .await
    };
    if !rebooted {
        write_facts().await?;
    }
    if first {
        for warning in &facts.warnings {
            tracing::warn!(%node, "{warning}");
        }
    }
    // What is recorded after this moment is newer than what the host is about to say.
    let as_of = inner.inventory.read().revision;
    let mut seen = agent.guest_observe_all(&context, ()).await?;
    if rebooted {
        // What ran when the power went may have lost what would tell why it ended. It did not shut itself down.
        for lost in seen.iter_mut().filter(|o| o.state == RuntimeState::Stopped && o.exit.is_none()) {
            lost.exit = Some(ExitReason::Crashed { detail: HOST_RESTARTED.into() });
        }
    }
    let present: BTreeSet<InstanceId> = seen.iter().map(|o| o.instance).collect();
    let mut unsure = false;
    for observed in &seen {
        unsure |= !record(inner, observed, Some(as_of)).await?;
    }
    let missing: Vec<Observed> = {
        let records = inner.inventory.read();
        records
            .runtimes
            .values()
            .filter(|r| r.state != RuntimeState::Stopped && !present.contains(&r.instance))
            .filter(|r| records.instances.get(&r.instance).is_some_and(|i| i.node == node))
            .map(|r| Observed {
                instance: r.instance,
                generation: r.generation,
                state: RuntimeState::Stopped,
                pid: None,
                domain_id: None,
                started_at: None,
                halt: None,
                exit: Some(ExitReason::Crashed {
                    detail: if rebooted {
                        HOST_RESTARTED.into()
                    } else {
                        "the host no longer knows it".into()
                    },
                }),
                applied_spec_version: r.applied_spec_version,
                accelerator: None,
            })
            .collect()
    };
    // After a restart of the host the desired power must survive, or nothing would start again.
    restart.rest |= first;
    let mut start_again = match rebooted || restart.rest {
        true => autostart_candidates(inner, node, &seen, !rebooted),
        false => vec![],
    };
    for observed in &missing {
        unsure |= !record(inner, observed, Some(as_of)).await?;
    }
    if first && node == inner.node {
        crate::uploads::drop_stale(inner, agent).await;
    }
    let new_boot = rebooted && restart.boot_id != facts.boot_id;
    if new_boot {
        let left = fix_left(inner, node, &facts.boot_id, &start_again).await?;
        start_again.retain(|(id, _)| left.contains(id));
        *restart = HostRestart { boot_id: facts.boot_id.clone(), ..HostRestart::default() };
    }
    if first || rebooted {
        ensure_all_networks(inner, node).await;
    }
    if node == inner.node && (first || new_boot) {
        let starting: BTreeSet<InstanceId> = start_again.iter().map(|(id, _)| *id).collect();
        crate::storage::life::after_boot(inner, new_boot, &starting).await;
    }
    let why = if rebooted { "after the host's restart" } else { "with the platform" };
    restart.starts.look(start_again, facts.cpus, why);
    restart.starts.go_on(inner).await;
    let waiting = !restart.starts.are_settled();
    restart.rest &= waiting;
    if rebooted && waiting {
        note_left(inner, node, restart).await?;
    } else if rebooted {
        // Last: whoever takes over from a daemon that dies before this finds the restart of the host anew.
        write_facts().await?;
    }
    let starts = restart.starts.next(inner.env.monotonic()).map_or(SWEEP, |wait| wait.clamp(SOON, SWEEP));
    Ok(if unsure { SOON } else { starts })
}

/// Records who starts with this boot of the host, before the first does, and which networks do. Answers who is left when it was
/// recorded already, by a daemon that has died since.
async fn fix_left(
    inner: &Arc<EngineInner>,
    node: NodeId,
    boot_id: &str,
    candidates: &[(InstanceId, Duration)],
) -> Result<BTreeSet<InstanceId>> {
    inner
        .transact(|records, tx| {
            let left: BTreeSet<InstanceId> = candidates.iter().map(|(id, _)| *id).collect();
            let Some(row) = records.nodes.get(&node) else { return Ok(left) };
            if let Some(recorded) = row.starting.as_ref().filter(|s| s.boot_id == boot_id) {
                return Ok(recorded.left.clone());
            }
            let starting = Starting { boot_id: boot_id.to_owned(), left: left.clone() };
            tx.replace(row, &Node { starting: Some(starting), ..row.value.clone() });
            // One at which a saga is at work becomes what that says.
            for network in records.networks.values().filter(|_| node == inner.node) {
                let target = crate::network::lock(network.id);
                if let Some(after) = network.after_a_host_start().filter(|_| records.lock(&target).is_none())
                {
                    tx.expect_unlocked(&target);
                    tx.replace(network, &after);
                }
            }
            Ok(left)
        })
        .await
}

/// Records who of them is left: who has come up and is stopped by its user is not started again, whatever daemon looks next.
async fn note_left(inner: &Arc<EngineInner>, node: NodeId, restart: &HostRestart) -> Result<()> {
    let left = restart.starts.left();
    let behind =
        |n: &Node| n.starting.as_ref().is_some_and(|s| s.boot_id == restart.boot_id && s.left != left);
    if !inner.inventory.read().nodes.get(&node).is_some_and(|row| behind(row)) {
        return Ok(());
    }
    inner
        .transact(|records, tx| {
            if let Some(row) = records.nodes.get(&node).filter(|row| behind(row)) {
                let starting = Starting { boot_id: restart.boot_id.clone(), left: left.clone() };
                tx.replace(row, &Node { starting: Some(starting), ..row.value.clone() });
            }
            Ok(())
        })
        .await
}

/// Does a saga hold the instance that will end by itself?
pub(crate) fn at_work(inner: &EngineInner, id: InstanceId) -> bool {
    let records = inner.inventory.read();
    let Some(lock) = records.lock(&crate::compute::lock(id)) else { return false };
    records.sagas.get(&lock.saga).is_some_and(|s| !matches!(s.phase, Phase::NeedsAttention { .. }))
}

/// What starts with the host, in order, each with the time to wait after it; or what the platform's end stopped alone.
fn autostart_candidates(
    inner: &EngineInner,
    node: NodeId,
    seen: &[Observed],
    stopped_only: bool,
) -> Vec<(InstanceId, Duration)> {
    let up: BTreeSet<_> = seen.iter().filter(|o| !o.state.is_down()).map(|o| o.instance).collect();
    let records = inner.inventory.read();
    let mut candidates: Vec<_> = records
        .instances
        .values()
        .filter(|i| i.node == node && i.lifecycle == Lifecycle::Ready)
        // Not those that an earlier look at this boot has started.
        .filter(|i| !up.contains(&i.id))
        .filter(|i| {
            let with_host = |r: &crate::Row<_>| crate::compute::shutdown::stopped_with_host(i, r);
            !stopped_only || records.runtimes.get(&i.id).is_some_and(with_host)
        })
        .filter_map(|i| {
            let (config, _) = records.expanded(i);
            let wanted = keys::optional_flag(&config, "boot.autostart")
                .unwrap_or(i.power != DesiredPower::Stopped)
                && keys::optional_flag(&config, "security.protection.start") != Some(true);
            let number = |key: &str| config.get(key).and_then(|v| v.parse::<u64>().ok()).unwrap_or(0);
            let order = (std::cmp::Reverse(number("boot.autostart.priority")), i.name.to_string());
            wanted.then(|| (order, i.id, Duration::from_secs(number("boot.autostart.delay"))))
        })
        .collect();
    candidates.sort_by(|a, b| a.0.cmp(&b.0));
    candidates.into_iter().map(|(_, id, delay)| (id, delay)).collect()
}

/// Records what a host saw, unless it is old news. Answers `false` when that must wait: a saga is at work on the instance
/// and reports itself, or the record is newer than `as_of`, the moment before the host was asked.
async fn record(inner: &Arc<EngineInner>, observed: &Observed, as_of: Option<Revision>) -> Result<bool> {
    let mut ended = None;
    let mut now = true;
    inner
        .transact(|records, tx| {
            ended = None;
            now = true;
            let Some(row) = records.instances.get(&observed.instance) else {
                return Ok(());
            };
            let lock = crate::compute::lock(row.id);
            let locked = records.lock(&lock).is_some();
            let old = records.runtimes.get(&row.id);
            if let Some(old) = old {
                let over = old.generation == observed.generation && old.state == RuntimeState::Stopped;
                if over || old.generation > observed.generation {
                    return Ok(());
                }
                let same = old.generation == observed.generation
                    && old.state == observed.state
                    && old.pid == observed.pid
                    && old.exit == observed.exit
                    && old.halt == observed.halt;
                if same {
                    // A look that finds all as it is recorded has seen enough: a saga may be at work for days. An event under one
                    // may be news by what the saga is about to report.
                    now = !locked || as_of.is_some();
                    return Ok(());
                }
            } else if observed.state == RuntimeState::Stopped {
                now = !locked;
                return Ok(());
            }
            let newer = old.zip(as_of).is_some_and(|(old, moment)| old.mod_revision > moment);
            if locked || newer {
                now = false;
                return Ok(());
            }
            if observed.generation > row.generation {
                return Ok(());
            }
            tx.expect_unlocked(&lock);
            let runtime = inner.runtime_of(records, observed);
            match old {
                Some(old) => tx.replace(old, &runtime),
                None => tx.create(&runtime),
            }
            if observed.state == RuntimeState::Stopped && row.power != DesiredPower::Stopped {
                // A start that failed is undone by force, and never recorded: that says nothing about what is wanted.
                let undone = matches!(observed.exit, None | Some(ExitReason::Forced))
                    && old.is_some_and(|old| old.generation < observed.generation);
                let shut_down_itself = !undone && !matches!(observed.exit, Some(ExitReason::Crashed { .. }));
                if shut_down_itself {
                    let mut instance = row.value.clone();
                    instance.power = DesiredPower::Stopped;
                    tx.replace(row, &instance);
                }
                let subject = Subject::Instance(Arc::new(row.value.clone()), Some(Arc::new(runtime.clone())));
                ended = Some((row.project, row.name.to_string(), subject, observed.exit.clone()));
            }
            Ok(())
        })
        .await?;
    if let Some((project, name, subject, exit)) = ended {
        let subject = Some(subject);
        let project_name = inner.project_name(Some(project));
        inner.events.send(Event {
            time: inner.env.now(),
            project: Some(project),
            subject,
            kind: EventKind::Lifecycle {
                action: "instance-shutdown",
                source: crate::compute::path(&project_name, &name),
                context: crate::events::reason_context(exit.as_ref(), false),
                requestor: "karst".into(),
            },
            project_name,
        });
    }
    Ok(now)
}

/// Tells who listens that a machine has written behind the threshold of a disk.
fn tell_threshold(inner: &EngineInner, reached: &ThresholdReached) {
    let context = BTreeMap::from([
        ("threshold".to_owned(), json!(reached.threshold)),
        ("excess".to_owned(), json!(reached.excess)),
    ]);
    inner.tell_of(reached.instance, DISK_THRESHOLD, Some(&reached.slot), context, "karst".into());
}

/// Tells who listens what happened in a machine.
fn tell_news(inner: &EngineInner, news: &MachineNews) {
    let context = crate::events::context_of(&news.what);
    inner.tell_of(news.instance, news.what.action(), news.what.slot(), context, "karst".into());
}

impl EngineInner {
    /// Tells who listens of something in an instance; of a device, by the name that it has, too.
    pub(crate) fn tell_of(
        &self,
        instance: InstanceId,
        action: &'static str,
        slot: Option<&str>,
        mut context: BTreeMap<String, serde_json::Value>,
        requestor: String,
    ) {
        let (row, runtime) = {
            let records = self.inventory.read();
            let Some(row) = records.instances.get(&instance) else { return };
            (row.value.clone(), records.runtimes.get(&row.id).map(|r| Arc::new(r.value.clone())))
        };
        if let Some(slot) = slot {
            let applied = runtime.as_ref().and_then(|r| r.applied.as_ref());
            let identities = applied.map_or_else(|| row.identities.clone(), |a| a.known_by(&row.identities));
            let device = identities.into_iter().find(|(_, i)| i.slot == slot).map(|(name, _)| name);
            context.extend([("device".to_owned(), json!(device)), ("slot".to_owned(), json!(slot))]);
        }
        let project_name = self.project_name(Some(row.project));
        self.events.send(Event {
            time: self.env.now(),
            project: Some(row.project),
            kind: EventKind::Lifecycle {
                action,
                source: crate::compute::path(&project_name, &row.name),
                context,
                requestor,
            },
            subject: Some(Subject::Instance(Arc::new(row), runtime)),
            project_name,
        });
    }
}

async fn ensure_all_networks(inner: &Arc<EngineInner>, node: NodeId) {
    let ids: Vec<_> = inner.inventory.read().networks.keys().copied().collect();
    for id in ids {
        if let Err(e) =
            inner.reconcile_network(node, id, &inner.reconcile_context(Duration::from_secs(60))).await
        {
            tracing::warn!(network = %id, error = %e, context = e.context.as_deref().unwrap_or_default(), "a network could not be brought up");
        }
    }
}

/// Keeps DHCP, DNS and the firewall of every network in step with the instances on it.
async fn networks(weak: Weak<EngineInner>) {
    let mut done: HashMap<NetworkId, NetworkSpec> = HashMap::new();
    let mut down: BTreeSet<NetworkId> = BTreeSet::new();
    let Some(mut changes) = weak.upgrade().map(|i| i.inventory.changes()) else {
        return;
    };
    loop {
        let Some(inner) = weak.upgrade() else { return };
        let (specs, stopped) = {
            let records = inner.inventory.read();
            let idle = |n: &&crate::Row<Network>| records.lock(&crate::network::lock(n.id)).is_none();
            let (active, stopped): (Vec<_>, Vec<_>) =
                records.networks.values().filter(idle).partition(|n| n.is_active());
            let specs = active.iter().filter_map(|n| inner.network_spec(&records, n.id).ok());
            let bridges = stopped.iter().filter(|n| n.kind == NetworkKind::Bridge).map(|n| n.id);
            (specs.collect::<Vec<NetworkSpec>>(), bridges.collect::<BTreeSet<NetworkId>>())
        };
        done.retain(|id, _| specs.iter().any(|s| s.id == *id));
        down.retain(|id| stopped.contains(id));
        let mut behind = false;
        for spec in specs {
            if done.get(&spec.id) == Some(&spec) {
                continue;
            }
            let context = inner.reconcile_context(Duration::from_secs(60));
            match inner.reconcile_network(inner.node, spec.id, &context).await {
                Ok(()) => drop(done.insert(spec.id, spec)),
                Err(e) => {
                    behind = true;
                    tracing::warn!(network = %spec.id, error = %e, "a network is behind; trying again");
                }
            }
        }
        for id in stopped {
            let context = inner.reconcile_context(Duration::from_secs(60));
            if down.contains(&id) {
                continue;
            }
            match inner.reconcile_network(inner.node, id, &context).await {
                Ok(()) => drop(down.insert(id)),
                Err(e) => {
                    behind = true;
                    tracing::warn!(network = %id, error = %e, "a network is not stopped yet; trying again");
                }
            }
        }
        let env = inner.env.clone();
        drop(inner);
        // A burst of changes is one change.
        env.sleep(Duration::from_millis(200)).await;
        let patience = if behind { SOON } else { SWEEP };
        match env.timeout(patience, changes.changed()).await {
            Ok(Ok(())) => {}
            Ok(Err(_)) => return,
            Err(_) if behind => {}
            // Somebody may have tampered with what the host has: look again.
            Err(_) => {
                done.clear();
                down.clear();
            }
        }
    }
}

/// Deletes ephemeral instances that have stopped, and old operations.
async fn housekeeping(weak: Weak<EngineInner>) {
    let Some(mut changes) = weak.upgrade().map(|i| i.inventory.changes()) else {
        return;
    };
    loop {
        let Some(inner) = weak.upgrade() else { return };
        if let Err(e) = tidy(&inner).await {
            tracing::warn!(error = %e, "housekeeping failed; trying again");
        }
        let env = inner.env.clone();
        drop(inner);
        // A burst of changes is one round; short, because who stopped an ephemeral instance looks for it next.
        env.sleep(Duration::from_millis(50)).await;
        if let Ok(Err(_)) = env.timeout(SWEEP, changes.changed()).await {
            return;
        }
    }
}

async fn tidy(inner: &Arc<EngineInner>) -> Result<()> {
    crate::saga::runner::recover(inner).await?;
    let gone: Vec<(String, String)> = {
        let records = inner.inventory.read();
        records
            .instances
            .values()
            .filter(|i| i.ephemeral && i.lifecycle == Lifecycle::Ready && i.generation.n > 0)
            .filter(|i| records.lock(&crate::compute::lock(i.id)).is_none())
            .filter(|i| {
                records
                    .runtimes
                    .get(&i.id)
                    .is_some_and(|r| r.state == RuntimeState::Stopped && r.generation == i.generation)
            })
            .filter_map(|i| Some((records.projects.get(&i.project)?.name.to_string(), i.name.to_string())))
            .collect()
    };
    let engine = Engine { inner: inner.clone() };
    for (project, name) in gone {
        if let Err(e) = engine.instance_delete(&Context::system(), &project, &name).await {
            tracing::warn!(instance = %name, error = %e, "an ephemeral instance could not be deleted");
        }
    }
    engine.forget_transient_networks().await;
    let mut tx = Tx::default();
    {
        let records = inner.inventory.read();
        let mut ended: Vec<_> = records
            .operations
            .values()
            .filter(|o| o.state.is_final() && o.state != OperationState::NeedsAttention)
            .collect();
        if ended.len() <= OPERATIONS_KEPT + 50 {
            return Ok(());
        }
        ended.sort_by_key(|o| o.updated_at);
        let surplus = (ended.len() - OPERATIONS_KEPT).min(100);
        for old in &ended[..surplus] {
            tx.delete(*old);
        }
    }
    // Refused: the next round reads again.
    let _ = inner.db.commit(tx).await?;
    Ok(())
}
