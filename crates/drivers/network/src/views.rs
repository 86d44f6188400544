//! Names of guests whose project is not their network's: each such project has a view of its own on the network, in which
//! its names are and no others, and nobody else sees it.
//!
//! A view is a second dnsmasq, for DNS alone, on another port of the bridge. Who asks which is decided by the port of the
//! bridge through which the question comes, which no guest can forge: the packet is marked there, and redirected where it
//! would reach a name server of the host. A view's port answers nothing that was not redirected to it. Guests of views have
//! reserved addresses, so that their names need not wait for leases; the network's own dnsmasq does not know their names.

use crate::{
    NetworkDriver, blocking, dnsmasq,
    record::{self, Paths, Record},
    ruleset::Table,
};
use karst_host::process::Process;
use karst_model::{
    NetworkId, ProjectId, Result,
    firewall::evaluate,
    network::DnsMode,
    spec::{NetworkHost, NetworkSpec},
};
use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    pin::Pin,
    sync::Arc,
    time::Duration,
};

/// The first port of views.
const FIRST: u16 = 30_053;
/// What marks a packet of a view, together with its port.
const MARK: u32 = 0x4b00_0000;
/// How long a view that ended waits to be started again.
const AGAIN: Duration = Duration::from_secs(1);

/// What this process knows of a network's views.
#[derive(Debug, Default)]
pub(crate) struct Views {
    /// What was wanted last.
    wanted: Option<(Record, NetworkSpec)>,
    /// Process ids of those that are watched.
    watched: BTreeMap<ProjectId, i32>,
}

/// Gives each view a port that it keeps; without names in the network's DNS there are no views.
pub(crate) fn assign(paths: &Paths, spec: &mut NetworkSpec) -> Result<()> {
    if spec.spec.dns_mode == DnsMode::None {
        spec.hosts.iter_mut().for_each(|h| h.view = None);
    }
    let wanted: BTreeSet<ProjectId> =
        spec.hosts.iter().filter_map(|h| h.view.as_ref()).map(|v| v.project).collect();
    let before = paths.read_views(spec.id);
    let mut ports: BTreeMap<ProjectId, u16> =
        before.iter().filter(|(p, _)| wanted.contains(p)).map(|(p, n)| (*p, *n)).collect();
    for project in wanted {
        if !ports.contains_key(&project) {
            let free = (FIRST..).find(|n| !ports.values().any(|p| p == n)).unwrap_or(FIRST);
            ports.insert(project, free);
        }
    }
    if ports != before {
        paths.write_views(spec.id, &ports)?;
    }
    for view in spec.hosts.iter_mut().filter_map(|h| h.view.as_mut()) {
        view.port = ports.get(&view.project).copied().unwrap_or_default();
    }
    Ok(())
}

/// Ports of a network's views.
pub(crate) fn ports(spec: &NetworkSpec) -> BTreeMap<ProjectId, u16> {
    let views = spec.hosts.iter().filter_map(|h| h.view.as_ref());
    views.filter(|v| v.port > 0).map(|v| (v.project, v.port)).collect()
}

/// A view lies below its network as a network of its project's id would.
fn place(paths: &Paths, record: &Record, project: ProjectId) -> (Paths, Record) {
    let below = Paths(paths.network(record.id).join("views"));
    (below, Record { id: NetworkId(project.uuid()), ..record.clone() })
}

/// The names of a view.
fn hosts(spec: &NetworkSpec, project: ProjectId) -> Vec<NetworkHost> {
    let of = |h: &&NetworkHost| h.view.as_ref().is_some_and(|v| v.project == project);
    let shown = |h: &NetworkHost| {
        let ipv6 = evaluate::addresses(spec, h).into_iter().find_map(|a| match a {
            IpAddr::V6(a) => Some(a),
            IpAddr::V4(_) => None,
        });
        NetworkHost { view: None, ipv6, ..h.clone() }
    };
    spec.hosts.iter().filter(of).map(shown).collect()
}

/// Ends the views that are not in `keep`.
pub(crate) fn stop(paths: &Paths, id: NetworkId, keep: &BTreeMap<ProjectId, u16>) -> Result<()> {
    let below = Paths(paths.network(id).join("views"));
    for view in below.ids()? {
        if !keep.keys().any(|p| p.uuid() == view.uuid()) {
            dnsmasq::stop(&below, view)?;
            crate::remove_directory(&below.network(view))?;
        }
    }
    Ok(())
}

/// Writes what a view reads; the process that serves it, if it is one that runs by this.
fn prepare(
    daemon: &str,
    paths: &Paths,
    record: &Record,
    spec: &NetworkSpec,
    view: (ProjectId, u16),
) -> Result<Option<Process>> {
    let (below, own) = place(paths, record, view.0);
    let changed = dnsmasq::write_hosts(&below, &own, &hosts(spec, view.0))?;
    if dnsmasq::write_configuration(daemon, &below, &own, Some(view.1))? != Some(false) {
        return Ok(None);
    }
    let running = dnsmasq::find(&below, own.id)?;
    if changed && let Some(process) = &running {
        dnsmasq::reload(process)?;
    }
    Ok(running)
}

impl NetworkDriver {
    /// Makes the views of a network what its guests need. `spec` has them with their ports.
    pub(crate) async fn ensure_views(
        &self,
        network: &Arc<tokio::sync::Mutex<crate::Live>>,
        views: &mut Views,
        record: &Record,
        spec: &NetworkSpec,
    ) -> Result<()> {
        let wanted = ports(spec);
        if wanted.is_empty() && views.wanted.is_none() && views.watched.is_empty() {
            let (paths, id) = (self.0.paths.clone(), record.id);
            return blocking(move || stop(&paths, id, &BTreeMap::new())).await;
        }
        views.wanted = Some((record.clone(), spec.clone()));
        views.watched.retain(|p, _| wanted.contains_key(p));
        let (paths, daemon, of, told, all) =
            (self.0.paths.clone(), self.0.daemon.clone(), record.clone(), spec.clone(), wanted.clone());
        let running = blocking(move || {
            stop(&paths, of.id, &all)?;
            let gid = dnsmasq::group()?;
            record::make_directory(&paths.network(of.id).join("views"), 0o750, Some(gid))?;
            all.into_iter()
                .map(|view| Ok((view.0, prepare(&daemon, &paths, &of, &told, view)?)))
                .collect::<Result<Vec<_>>>()
        })
        .await?;
        for (project, process) in running {
            let process = match process {
                Some(process) => process,
                None => {
                    let (below, own) = place(&self.0.paths, record, project);
                    dnsmasq::start(&below, &own).await?
                }
            };
            if views.watched.insert(project, process.pid()) != Some(process.pid()) {
                self.watch_view(Arc::downgrade(network), project, process);
            }
        }
        Ok(())
    }

    /// [`Self::ensure_views`], for the task that it begins itself.
    fn views_again<'a>(
        &'a self,
        network: &'a Arc<tokio::sync::Mutex<crate::Live>>,
        views: &'a mut Views,
        record: &'a Record,
        spec: &'a NetworkSpec,
    ) -> Pin<Box<dyn Future<Output = Result<()>> + Send + 'a>> {
        Box::pin(self.ensure_views(network, views, record, spec))
    }

    /// Starts a view again when it ends, as long as it is wanted.
    fn watch_view(
        &self,
        network: std::sync::Weak<tokio::sync::Mutex<crate::Live>>,
        project: ProjectId,
        process: Process,
    ) {
        let inner = Arc::downgrade(&self.0);
        tokio::spawn(async move {
            if let Err(e) = process.ended().await {
                tracing::error!(error = %e, "a dnsmasq can not be watched");
                return;
            }
            loop {
                tokio::time::sleep(AGAIN).await;
                let (Some(inner), Some(network)) = (inner.upgrade(), network.upgrade()) else { return };
                let mut live = network.lock().await;
                if live.views.watched.get(&project) != Some(&process.pid()) {
                    return; // somebody was faster, or it is not wanted any more
                }
                let Some((record, spec)) = live.views.wanted.clone() else { return };
                tracing::warn!(bridge = %record.bridge, pid = process.pid(), "names of a project ended; starting them again");
                let driver = NetworkDriver(inner);
                match driver.views_again(&network, &mut live.views, &record, &spec).await {
                    Ok(()) => return,
                    Err(e) => {
                        tracing::error!(error = %e, context = e.context, "names could not be started again")
                    }
                }
            }
        });
    }
}

/// Who asks which: marks at the ports of bridges, redirections, and a guard for the ports of views.
pub(crate) fn rules(inet: &mut Table, bridge: &mut Table, networks: &[NetworkSpec]) {
    for network in networks {
        for (_, port) in ports(network) {
            let mark = MARK | u32::from(port);
            inet.base("views", "nat hook prerouting priority dstnat - 5; policy accept").push(format!(
                "iifname \"{}\" meta mark {mark:#010x} fib daddr type local meta l4proto {{ tcp, udp }} th dport 53 redirect to :{port}",
                network.bridge
            ));
            let v4 = network.spec.own4().map(|n| format!("ip daddr {}", n.addr()));
            let v6 = network.spec.own6().map(|n| format!("ip6 daddr {}", n.addr()));
            let guard = inet.base("view_guard", "filter hook input priority filter - 1; policy accept");
            guard.extend(v4.chain(v6).map(|own| {
                format!(
                    "iifname != \"lo\" {own} meta l4proto {{ tcp, udp }} th dport {port} ct status & dnat == 0 drop"
                )
            }));
        }
        for host in &network.hosts {
            let (Some(view), Some(interface)) = (&host.view, host.port.as_ref().map(|p| &p.interface)) else {
                continue;
            };
            if view.port == 0 || interface.is_empty() {
                continue;
            }
            let marks = bridge.base("names", "filter hook prerouting priority -199; policy accept");
            if marks.is_empty() {
                marks
                    .extend(["udp", "tcp"].map(|p| format!("{p} dport 53 meta mark set iifname map @views")));
            }
            bridge
                .map("views", "type ifname : mark;")
                .insert(format!("\"{interface}\" : {:#010x}", MARK | u32::from(view.port)));
        }
    }
}
