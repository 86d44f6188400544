//! What goes on inside a guest, by whichever agent it has: Karst's own where that runs, else the QEMU guest agent.
//!
//! Karst's own gives terminals, streams that flow, file systems that thaw by themselves, figures. QEMU's is what most
//! images have when they come from elsewhere. Which one answers may change while a guest boots, so it is decided at each
//! request, by which side of which port the guest has open (QEMU tells).

mod command;
mod exec;
mod files;
mod link;
#[cfg(test)]
mod tests;

pub(crate) use link::Link;
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) use link::taken;

use crate::{agent::Agent, line::printable};
use karst_guest::{Exec, ExecRequest, FileWrite, Interface, OpenedFile};
use karst_guest_agent::message::{self, Figures, Frozen, Info, Nothing, Request};
use karst_model::{
    Error, ErrorKind, Result,
    guest::{AgentKind, GuestSystem},
};
use serde_json::{Value, json};
use std::{
    collections::BTreeMap,
    net::IpAddr,
    os::fd::OwnedFd,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};
use tokio::{
    sync::watch,
    time::{Instant, sleep},
};

/// How long figures wait for a guest's agent.
const FIGURES: Duration = Duration::from_secs(1);
/// How long it is looked in the background whether an agent answers again.
const LOOK: Duration = Duration::from_secs(5);
/// How long an agent may take to hear that the system is to go down.
const ASKED: Duration = Duration::from_secs(5);
/// How long the file systems may take until they are still.
const FREEZE: Duration = Duration::from_secs(30);
/// How long a guest may take to boot until it can mount its directories.
const MOUNTING: Duration = Duration::from_secs(180);
/// Between two tries.
const MOUNT_AGAIN: Duration = Duration::from_secs(2);
/// How long one of them may take.
const MOUNT: Duration = Duration::from_secs(20);
/// At most this many interfaces and addresses are taken from a guest.
const MOST: usize = 64;

/// Which ports the guest has open; `None` is not known yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Ports {
    karst: Option<bool>,
    qemu: Option<bool>,
}

impl Ports {
    /// The agent to ask.
    fn kind(self) -> Option<AgentKind> {
        match (self.karst, self.qemu) {
            (Some(true), _) => Some(AgentKind::Karst),
            (_, Some(true)) => Some(AgentKind::Qemu),
            _ => None,
        }
    }
}

/// A directory of the host that a guest mounts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct SharedDirectory {
    pub(crate) mount: message::Mount,
    /// By virtiofs; else by 9p.
    pub(crate) virtiofs: bool,
}

impl SharedDirectory {
    fn request(&self) -> Request {
        let mount = self.mount.clone();
        if self.virtiofs { Request::MountVirtiofs(mount) } else { Request::Mount(mount) }
    }
}

/// The agents of one guest.
#[derive(Debug)]
pub(crate) struct Inside {
    link: Arc<Link>,
    qemu: Arc<Agent>,
    ports: watch::Sender<Ports>,
    /// The agent let a sample wait in vain. Samples leave it alone until it has answered a look, for which nobody waits.
    silent: AtomicBool,
    /// Such a look is on its way.
    looking: AtomicBool,
    /// Directories of the host that its own agent mounts.
    directories: Vec<SharedDirectory>,
}

enum Chosen<'a> {
    Karst(&'a Arc<Link>),
    Qemu(&'a Arc<Agent>),
}

impl Inside {
    /// The agents behind the sockets in the state directory `dir` of the guest that users call `name`.
    pub(crate) fn new(dir: PathBuf, name: String) -> Self {
        Self {
            link: Arc::new(Link::new(dir.clone(), name.clone())),
            qemu: Arc::new(Agent::new(dir, name)),
            ports: watch::Sender::new(Ports::default()),
            silent: AtomicBool::new(false),
            looking: AtomicBool::new(false),
            directories: vec![],
        }
    }

    /// The same for a guest that mounts directories of the host.
    #[must_use]
    pub(crate) fn with_directories(self, directories: Vec<SharedDirectory>) -> Self {
        Self { directories, ..self }
    }

    /// Who answers now.
    pub(crate) fn kind(&self) -> Option<AgentKind> {
        self.ports.borrow().kind()
    }

    /// QEMU tells that the guest opened or closed a port; the device's or character device's id.
    pub(crate) fn port(&self, id: &str, open: bool) {
        let changed = self.ports.send_if_modified(|p| {
            let port = match id {
                "agent" => &mut p.qemu,
                "karst" => &mut p.karst,
                _ => return false,
            };
            *port != Some(open) && port.replace(open) != Some(open)
        });
        if changed {
            // Another agent, or the same after it began anew.
            self.silent.store(false, Ordering::Relaxed);
        }
        if id == "karst" && !open {
            self.link.closed();
        }
        if id == "karst" && open && changed {
            self.mount_soon();
        }
    }

    /// Has the directories mounted, in the background: at each boot, and again when the agent begins anew.
    fn mount_soon(&self) {
        if !self.directories.is_empty() {
            tokio::spawn(mount_all(self.link.clone(), self.ports.subscribe(), self.directories.clone()));
        }
    }

    /// The same from `query-chardev`.
    pub(crate) fn ports(&self, answer: &Value) {
        for device in answer.as_array().into_iter().flatten() {
            if let (Some(label), Some(open)) = (
                device.get("label").and_then(Value::as_str),
                device.get("frontend-open").and_then(Value::as_bool),
            ) {
                self.port(label, open);
            }
        }
    }

    async fn chosen(&self) -> Result<Chosen<'_>> {
        let ports = *self.ports.borrow();
        match ports {
            Ports { karst: Some(true), .. } => Ok(Chosen::Karst(&self.link)),
            Ports { karst: Some(false), qemu: Some(false) } => Err(self.qemu.silent()),
            Ports { karst: Some(false), .. } => Ok(Chosen::Qemu(&self.qemu)),
            // Another process follows QEMU's events, so we are not told: asked.
            Ports { karst: None, .. } => {
                let probe = Request::Info(Nothing {});
                match self.link.call::<Info>(probe, Duration::from_secs(2)).await {
                    Ok(_) => Ok(Chosen::Karst(&self.link)),
                    Err(_) => Ok(Chosen::Qemu(&self.qemu)),
                }
            }
        }
    }

    /// Is there an agent at all?
    ///
    /// # Errors
    /// Unavailable when there is none.
    pub(crate) async fn there(&self) -> Result<()> {
        self.chosen().await.map(drop)
    }

    /// What only Karst's own agent can do.
    async fn own(&self, what: &str) -> Result<&Arc<Link>> {
        match self.chosen().await? {
            Chosen::Karst(link) => Ok(link),
            Chosen::Qemu(_) => Err(Error::unsupported(format!(
                "{what} needs Karst's own agent in the guest; it comes with images that know cloud-init or Incus"
            ))),
        }
    }

    /// Runs a program.
    pub(crate) async fn exec(&self, base: &BTreeMap<String, String>, request: ExecRequest) -> Result<Exec> {
        match self.chosen().await? {
            Chosen::Karst(link) => exec::start(link, base, request).await,
            Chosen::Qemu(agent) => crate::exec::start(agent.clone(), base, request).await,
        }
    }

    /// Opens a file for reading.
    pub(crate) async fn open(&self, path: &str) -> Result<OpenedFile> {
        match self.chosen().await? {
            Chosen::Karst(link) => files::open(link, path).await,
            Chosen::Qemu(agent) => crate::files::open(agent, path).await,
        }
    }

    /// Writes a file.
    pub(crate) async fn write(&self, request: FileWrite, content: Option<OwnedFd>) -> Result<()> {
        match self.chosen().await? {
            Chosen::Karst(link) => files::write(link, request, content).await,
            Chosen::Qemu(agent) => crate::files::write(agent, request, content).await,
        }
    }

    /// Deletes a file or an empty directory.
    pub(crate) async fn delete(&self, path: &str) -> Result<()> {
        match self.chosen().await? {
            Chosen::Karst(link) => files::delete(link, path).await,
            Chosen::Qemu(agent) => crate::files::delete(agent, path).await,
        }
    }

    /// Interfaces by name; `host` tells the host's end of a MAC address. Empty when nobody answers at once.
    pub(crate) async fn interfaces(
        self: &Arc<Self>,
        host: impl Fn(&str) -> Option<String>,
    ) -> BTreeMap<String, Interface> {
        let found = match self.sampled() {
            None => return BTreeMap::new(),
            Some(Chosen::Karst(link)) => {
                let call = link.call::<message::Interfaces>(Request::Interfaces(Nothing {}), FIGURES);
                call.await.map(|i| interfaces(i, host))
            }
            Some(Chosen::Qemu(agent)) => {
                let call = agent.call("guest-network-get-interfaces", json!({}), FIGURES);
                call.await.map(|v| interfaces_of_qemu(&v, host))
            }
        };
        found.unwrap_or_else(|e| {
            tracing::debug!(error = %e, "a guest did not tell its interfaces");
            if e.is(ErrorKind::Unavailable) {
                self.silent.store(true, Ordering::Relaxed);
            }
            BTreeMap::new()
        })
    }

    /// Without asking the guest which agent it has.
    fn chosen_at_once(&self) -> Option<Chosen<'_>> {
        match *self.ports.borrow() {
            Ports { karst: Some(true), .. } => Some(Chosen::Karst(&self.link)),
            Ports { qemu: Some(true), .. } => Some(Chosen::Qemu(&self.qemu)),
            Ports { karst: None, qemu: None } => Some(Chosen::Karst(&self.link)),
            _ => None,
        }
    }

    /// The agent that a sample asks: none where it let the last one wait.
    fn sampled(self: &Arc<Self>) -> Option<Chosen<'_>> {
        if self.silent.load(Ordering::Relaxed) {
            self.look();
            return None;
        }
        self.chosen_at_once()
    }

    /// Finds out in the background whether the agent answers again.
    fn look(self: &Arc<Self>) {
        if self.looking.swap(true, Ordering::Relaxed) {
            return;
        }
        let inside = self.clone();
        tokio::spawn(async move {
            let answers = match inside.chosen_at_once() {
                None => false,
                Some(Chosen::Karst(link)) => link.call::<Info>(Request::Info(Nothing {}), LOOK).await.is_ok(),
                Some(Chosen::Qemu(agent)) => agent.ping(LOOK).await.is_ok(),
            };
            if answers {
                inside.silent.store(false, Ordering::Relaxed);
            }
            inside.looking.store(false, Ordering::Relaxed);
        });
    }

    /// Figures of the system inside, and what it is; nothing when nobody answers at once.
    pub(crate) async fn system(self: &Arc<Self>) -> (Option<Figures>, Option<GuestSystem>) {
        let short = |s: &str| printable(s, 128);
        match self.sampled() {
            None => (None, None),
            Some(Chosen::Karst(link)) => {
                let figures = link.call::<Figures>(Request::Figures(Nothing {}), FIGURES);
                let info = link.call::<Info>(Request::Info(Nothing {}), FIGURES);
                let (figures, info) = tokio::join!(figures, info);
                let system = info.ok().map(|i| GuestSystem {
                    agent: AgentKind::Karst,
                    os: short(&i.os),
                    os_version: short(&i.os_version),
                    kernel: short(&i.kernel),
                    hostname: short(&i.hostname),
                    fqdn: short(&i.fqdn),
                });
                (figures.ok(), system)
            }
            Some(Chosen::Qemu(agent)) => {
                let Ok(os) = agent.call("guest-get-osinfo", json!({}), FIGURES).await else {
                    return (None, None);
                };
                let name = agent.call("guest-get-host-name", json!({}), FIGURES).await.unwrap_or_default();
                let text = |v: &Value, k: &str| short(v.get(k).and_then(Value::as_str).unwrap_or_default());
                let hostname = text(&name, "host-name");
                let system = GuestSystem {
                    agent: AgentKind::Qemu,
                    os: text(&os, "name"),
                    os_version: text(&os, "version-id"),
                    kernel: text(&os, "kernel-release"),
                    fqdn: hostname.clone(),
                    hostname,
                };
                (None, Some(system))
            }
        }
    }

    /// Asks the system to go down, whichever agents there are. Returns at once; what it answers can be ended before it has
    /// asked.
    pub(crate) fn shut_down(&self) -> tokio::task::JoinHandle<()> {
        let ports = *self.ports.borrow();
        let (link, agent) = (self.link.clone(), self.qemu.clone());
        tokio::spawn(async move {
            let asked = match ports.karst {
                Some(false) => false,
                _ => {
                    let request = Request::Shutdown(message::Shutdown { reboot: false });
                    link.call::<Nothing>(request, Duration::from_secs(5)).await.is_ok()
                }
            };
            if !asked && ports.qemu != Some(false) {
                // It does not answer when it follows.
                let _ =
                    agent.call("guest-shutdown", json!({"mode": "powerdown"}), Duration::from_secs(5)).await;
            }
        })
    }

    /// Asks the agent to have the system go down, or boot anew.
    ///
    /// # Errors
    /// Unavailable without an agent; what the guest refuses.
    pub(crate) async fn ask(&self, anew: bool) -> Result<()> {
        let mode = if anew { "reboot" } else { "powerdown" };
        self.command("guest-shutdown", json!({"mode": mode}), ASKED).await.map(drop)
    }

    /// Makes the file systems still for at most `limit`; how many.
    ///
    /// # Errors
    /// Unavailable without an agent; unsupported when the QEMU guest agent forbids it.
    pub(crate) async fn freeze(&self, limit: Duration) -> Result<u32> {
        match self.chosen().await? {
            Chosen::Karst(link) => {
                let limit = u32::try_from(limit.as_millis()).unwrap_or(u32::MAX).min(message::MAX_FREEZE);
                let frozen: Frozen = link.call(Request::Freeze(message::Freeze { limit }), FREEZE).await?;
                Ok(frozen.count)
            }
            Chosen::Qemu(agent) => {
                let v = agent.call("guest-fsfreeze-freeze", json!({}), FREEZE).await?;
                Ok(v.as_u64().unwrap_or(0) as u32)
            }
        }
    }

    /// Lets them go on; how many.
    ///
    /// # Errors
    /// Conflict when they had thawed by themselves before: what was made meanwhile is not consistent.
    pub(crate) async fn thaw(&self) -> Result<u32> {
        match self.chosen().await? {
            Chosen::Karst(link) => {
                let thawed: Frozen = link.call(Request::Thaw(Nothing {}), FREEZE).await?;
                if thawed.expired {
                    return Err(Error::conflict(
                        "the file systems of the guest thawed before the snapshot was done, because it took too long; try again",
                    ));
                }
                Ok(thawed.count)
            }
            Chosen::Qemu(agent) => {
                let v = agent.call("guest-fsfreeze-thaw", json!({}), FREEZE).await?;
                Ok(v.as_u64().unwrap_or(0) as u32)
            }
        }
    }

    /// Sets the guest's clock to the host's.
    ///
    /// # Errors
    /// Unsupported without Karst's own agent.
    pub(crate) async fn set_time(&self) -> Result<()> {
        let link = self.own("setting the clock").await?;
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        let time = message::Time { nanoseconds: i64::try_from(now.as_nanos()).unwrap_or(i64::MAX) };
        link.call::<Nothing>(Request::SetTime(time), Duration::from_secs(5)).await.map(drop)
    }

    /// The same after the guest stood still, in the background: a guest without an agent has other means.
    pub(crate) fn set_time_soon(self: &Arc<Self>) {
        let inside = self.clone();
        tokio::spawn(async move {
            if inside.kind() == Some(AgentKind::Karst)
                && let Err(e) = inside.set_time().await
            {
                tracing::debug!(error = %e, "the clock of a guest could not be set");
            }
        });
    }
}

/// Has the agent mount directories in their order, each as soon as the guest is ready for it.
async fn mount_all(link: Arc<Link>, ports: watch::Receiver<Ports>, directories: Vec<SharedDirectory>) {
    for directory in directories {
        let mut ports = ports.clone();
        tokio::select! {
            biased;
            // Closed, or of a machine that nobody holds any more: with whoever opens it next this begins anew.
            _ = async { ports.wait_for(|p| p.karst != Some(true)).await.is_ok() } => return,
            () = mount(&link, directory) => {}
        }
    }
}

async fn mount(link: &Arc<Link>, directory: SharedDirectory) {
    let until = Instant::now() + MOUNTING;
    loop {
        let outcome = link.call::<Nothing>(directory.request(), MOUNT).await;
        let Err(e) = outcome else { return };
        let later = matches!(e.kind, ErrorKind::Unavailable | ErrorKind::Timeout);
        if !later || Instant::now() >= until {
            tracing::warn!(
                guest = link.name(), path = ?directory.mount.path, error = %e, context = e.context,
                "a directory of the host is not mounted in a guest"
            );
            return;
        }
        sleep(MOUNT_AGAIN).await;
    }
}

fn scope(address: IpAddr) -> &'static str {
    match address {
        a if a.is_loopback() => "local",
        IpAddr::V4(a) if a.is_link_local() => "link",
        IpAddr::V6(a) if a.is_unicast_link_local() => "link",
        _ => "global",
    }
}

fn interfaces(
    all: message::Interfaces,
    host: impl Fn(&str) -> Option<String>,
) -> BTreeMap<String, Interface> {
    let one = |i: message::Interface| {
        let mac = printable(&i.mac, 64).to_lowercase();
        let address = |(bytes, prefix): &(message::Bytes, u8)| {
            let ip = match bytes.0.len() {
                4 => IpAddr::from(<[u8; 4]>::try_from(&bytes.0[..]).ok()?),
                _ => IpAddr::from(<[u8; 16]>::try_from(&bytes.0[..]).ok()?),
            };
            Some((ip, (*prefix).min(128), scope(ip).to_owned()))
        };
        let counter = |n: usize| i.counters.get(n).copied().unwrap_or(0);
        let interface = Interface {
            host_name: host(&mac).unwrap_or_default(),
            mac,
            mtu: i.mtu,
            up: i.up,
            loopback: i.loopback,
            addresses: i.addresses.iter().take(MOST).filter_map(address).collect(),
            counters: [counter(0), counter(1), counter(2), counter(3)],
            losses: [counter(4), counter(5), counter(6), counter(7)],
        };
        (printable(&i.name, 64), interface)
    };
    all.list.into_iter().take(MOST).map(one).collect()
}

fn interfaces_of_qemu(v: &Value, host: impl Fn(&str) -> Option<String>) -> BTreeMap<String, Interface> {
    let mut out = BTreeMap::new();
    for i in v.as_array().into_iter().flatten().take(MOST) {
        let text = |k: &str| printable(i.get(k).and_then(Value::as_str).unwrap_or(""), 64);
        let name = text("name");
        let mac = text("hardware-address").to_lowercase();
        let host_name = host(&mac).unwrap_or_default();
        let mut addresses = vec![];
        for a in i.get("ip-addresses").and_then(Value::as_array).into_iter().flatten().take(MOST) {
            let Some(address) =
                a.get("ip-address").and_then(Value::as_str).and_then(|s| s.parse::<IpAddr>().ok())
            else {
                continue;
            };
            let prefix = a.get("prefix").and_then(Value::as_u64).unwrap_or(0).min(128) as u8;
            addresses.push((address, prefix, scope(address).to_owned()));
        }
        let count = |k: &str| i.get("statistics").and_then(|s| s.get(k)).and_then(Value::as_u64).unwrap_or(0);
        let mtu = match host_name.is_empty() {
            true => 0,
            false => {
                std::fs::read_to_string(std::path::Path::new("/sys/class/net").join(&host_name).join("mtu"))
                    .ok()
                    .and_then(|s| s.trim().parse().ok())
                    .unwrap_or(0)
            }
        };
        out.insert(
            name.clone(),
            Interface {
                loopback: name == "lo"
                    || (!addresses.is_empty() && addresses.iter().all(|(a, ..)| a.is_loopback())),
                // The agent does not tell; an interface that is down has no addresses.
                up: !addresses.is_empty(),
                mac,
                host_name,
                mtu,
                counters: [count("rx-bytes"), count("tx-bytes"), count("rx-packets"), count("tx-packets")],
                losses: [count("rx-errs"), count("tx-errs"), count("rx-dropped"), count("tx-dropped")],
                addresses,
            },
        );
    }
    out
}
