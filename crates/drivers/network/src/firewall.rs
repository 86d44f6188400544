//! The firewall of all networks of this daemon: its own nft tables, and, where somebody else's firewall drops by default,
//! accepts in *that* firewall. An accept in a table of ours would not do: netfilter runs every base chain of a hook, and one
//! drop is final.
//!
//! - iptables (Docker, ufw, hand-made rules), nft and legacy tables alike: two chains of ours, called from `INPUT` and from
//!   `DOCKER-USER` where Docker has it in use, otherwise from `FORWARD`. Docker and ufw rebuild their own chains, not these.
//! - firewalld: the bridge joins the zone `trusted`, at run time only.
//! - Any other base chain that drops by default is named in a warning.

use crate::loose::Loose;
use crate::{
    acl_log::Reader,
    record::Paths,
    rules::{self, Logs},
    ruleset::{Table, comparable},
};
use karst_host::{Program, nft, run};
use karst_model::{Result, spec::NetworkSpec};
use serde_json::Value;
use std::{collections::BTreeSet, fmt::Write};

/// What was seen and done last.
#[derive(Debug, Default)]
pub(crate) struct Firewall {
    /// Networks as they are wanted, by id: filled by the driver.
    pub known: Vec<NetworkSpec>,
    /// Ports on no network, by guest.
    pub loose: Loose,
    /// Generation of the ruleset at which everything was found right, and what was wanted then.
    settled: Option<(u32, Vec<NetworkSpec>)>,
    /// The daemon's tables as they were applied last.
    tables: Option<Applied>,
    /// Our iptables lines as they were listed after being applied, per backend, with the text that was applied.
    iptables: [Option<(Vec<String>, String)>; 4],
    /// This kernel can answer what it refuses on a bridge.
    bridge_reject: Option<bool>,
    /// Where ACLs log to, once one does; `Err` where this kernel has no such thing.
    log: Option<Result<Reader, ()>>,
    /// What others' firewalls were made to accept, and at which generation that was found so.
    others: Option<(u32, Vec<Others>)>,
    /// Base chains of others that drop what guests send or receive.
    pub warnings: Vec<String>,
}

#[derive(Debug)]
struct Applied {
    tables: [Table; 2],
    /// Generation of the ruleset right after, when nobody else changed it in between.
    generation: Option<u32>,
    /// How nft lists them: taken when somebody else changed something, since it costs with many rules.
    listing: Option<[Vec<Value>; 2]>,
}

/// What of a network concerns other firewalls.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Others {
    bridge: String,
    v4: Option<std::net::Ipv4Addr>,
    v6: Option<std::net::Ipv6Addr>,
    firewall: [bool; 2],
    translated: [bool; 2],
    dhcp: [bool; 2],
    forwards: bool,
    views: bool,
}

impl Others {
    fn of(n: &NetworkSpec) -> Self {
        Self {
            bridge: n.bridge.clone(),
            v4: n.spec.ipv4.map(|a| a.addr()),
            v6: n.spec.ipv6.map(|a| a.addr()),
            firewall: [n.spec.firewall, n.spec.firewall6],
            translated: [n.spec.nat, n.spec.nat6],
            dhcp: [n.spec.dhcp, n.spec.dhcp6],
            forwards: !n.forwards.is_empty(),
            views: !crate::views::ports(n).is_empty(),
        }
    }
    fn concerns(&self, v6: bool) -> bool {
        self.firewall[usize::from(v6)] && if v6 { self.v6.is_some() } else { true }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Backend {
    legacy: bool,
    v6: bool,
}

impl Backend {
    fn index(self) -> usize {
        usize::from(self.legacy) + 2 * usize::from(self.v6)
    }
    fn list(self) -> Program {
        match (self.v6, self.legacy) {
            (false, false) => Program::IptablesNft,
            (false, true) => Program::IptablesLegacy,
            (true, false) => Program::Ip6tablesNft,
            (true, true) => Program::Ip6tablesLegacy,
        }
    }
    fn restore(self) -> Program {
        match (self.v6, self.legacy) {
            (false, false) => Program::IptablesNftRestore,
            (false, true) => Program::IptablesLegacyRestore,
            (true, false) => Program::Ip6tablesNftRestore,
            (true, true) => Program::Ip6tablesLegacyRestore,
        }
    }
    fn family(self) -> &'static str {
        if self.v6 { "ip6" } else { "ip" }
    }
}

impl Firewall {
    /// Replaces the ports on no network; applied by the next [`Firewall::reconcile`].
    pub fn set_loose(&mut self, loose: Loose) {
        self.loose = loose;
        self.settled = None;
    }

    /// Makes the host's rules what the known networks want. Microseconds when nobody changed anything since the last time;
    /// a change of ours alone costs what it changes.
    pub async fn reconcile(&mut self, daemon: &str, paths: &Paths) -> Result<()> {
        let networks = std::mem::take(&mut self.known);
        let result = self.reconcile_all(daemon, paths, &networks).await;
        self.known = networks;
        result
    }

    async fn reconcile_all(&mut self, daemon: &str, paths: &Paths, networks: &[NetworkSpec]) -> Result<()> {
        let others: Vec<Others> = networks.iter().map(Others::of).collect();
        let legacy: Vec<Backend> = [false, true]
            .into_iter()
            .filter(|v6| legacy_in_use(*v6, "filter"))
            .map(|v6| Backend { legacy: true, v6 })
            .collect();
        let generation = nft::generation()?;
        if self.settled.as_ref().is_some_and(|(g, n)| *g == generation && n == networks) {
            // Legacy tables have no generation: where they are in use, they alone are read each time.
            for backend in &legacy {
                self.iptables(*backend, daemon, paths, &others).await?;
            }
            return Ok(());
        }
        self.settled = None;
        let after = self.own_tables(daemon, paths, networks, generation).await?;
        for backend in &legacy {
            self.iptables(*backend, daemon, paths, &others).await?;
        }
        if self.others.as_ref().is_some_and(|(g, o)| *g == generation && *o == others) {
            // Nothing but our own tables has changed since others were looked at.
            self.others = Some((after, others));
            self.settled = Some((after, networks.to_vec()));
            return Ok(());
        }
        let chains = nft::list_chains().await?;
        for v6 in [false, true] {
            let backend = Backend { legacy: false, v6 };
            if has_table(&chains, backend.family(), "filter") {
                self.iptables(backend, daemon, paths, &others).await?;
            }
        }
        let mut warnings = self.firewalld(paths, &chains, &others).await?;
        if !networks.is_empty() {
            warnings.extend(foreign_drops(&chains));
        }
        for warning in warnings.iter().filter(|w| !self.warnings.contains(w)) {
            tracing::warn!("{warning}");
        }
        self.warnings = warnings;
        // The generation from before the listing: where something was changed since, by us or by others, the next call looks
        // once more, and only what was found right at one generation counts as settled.
        self.others = Some((after, others));
        self.settled = Some((after, networks.to_vec()));
        Ok(())
    }

    async fn firewalld(&mut self, paths: &Paths, chains: &[Value], others: &[Others]) -> Result<Vec<String>> {
        let mut warnings = Vec::new();
        let mut host = paths.read_host()?;
        let bridges: BTreeSet<String> =
            others.iter().filter(|o| o.firewall.contains(&true)).map(|o| o.bridge.clone()).collect();
        if ["inet", "ip", "ip6"].iter().any(|family| has_table(chains, family, "firewalld")) {
            let stale: Vec<String> = host.firewalld.difference(&bridges).cloned().collect();
            if !bridges.is_subset(&host.firewalld) {
                host.firewalld.extend(bridges.iter().cloned());
                paths.write_host(&host)?;
            }
            for bridge in &bridges {
                // Its table may be what a firewalld that ended badly left: no reason to refuse a network, one to say so.
                if let Err(e) = firewalld_join(bridge).await {
                    tracing::debug!(bridge, context = e.context, "firewall-cmd failed");
                    warnings.push(format!(
                        "the rules of firewalld are loaded, but it does not put the bridge {bridge:?} into its zone trusted: \
                         guests may get no address and reach nothing"
                    ));
                }
            }
            for bridge in stale {
                firewalld_leave(&bridge).await;
                host.firewalld.remove(&bridge);
                paths.write_host(&host)?;
            }
        } else if !host.firewalld.is_empty() && others.is_empty() {
            // firewalld is gone, and what it knew at run time with it.
            host.firewalld.clear();
            paths.write_host(&host)?;
        }
        Ok(warnings)
    }

    /// Brings the daemon's own tables up to date. Answers the generation at which they are, and everything else is as it was
    /// at `generation`.
    async fn own_tables(
        &mut self,
        daemon: &str,
        paths: &Paths,
        networks: &[NetworkSpec],
        generation: u32,
    ) -> Result<u32> {
        self.read_logs(daemon, paths, networks);
        let reject = self.bridge_reject().await?;
        let wanted = rules::tables(self.logs(daemon), networks, reject, &self.loose);
        if let Some(applied) = &mut self.tables
            && applied.generation == Some(generation)
        {
            if applied.tables == wanted {
                return Ok(generation);
            }
            let [a, b] = [0, 1].map(|i| wanted[i].change(&applied.tables[i]));
            if let (Some(a), Some(b)) = (a, b) {
                nft::apply(&format!("{a}{b}")).await?;
                return self.applied(wanted, generation);
            }
        }
        let name = rules::table_name(daemon);
        let list = async || {
            let [inet, bridge] =
                [nft::list_table("inet", &name).await?, nft::list_table("bridge", &name).await?];
            Ok::<_, karst_model::Error>([comparable(&inet), comparable(&bridge)])
        };
        let there = list().await?;
        // Only a comparison with what nft itself listed after applying is independent of how a version of nft writes rules.
        if let Some(applied) = &mut self.tables
            && applied.tables == wanted
            && applied.listing.as_ref() == Some(&there)
        {
            applied.generation = Some(generation);
            return Ok(generation);
        }
        let text = format!("{}{}", wanted[0].replace(&there[0]), wanted[1].replace(&there[1]));
        if text.is_empty() {
            self.tables =
                Some(Applied { tables: wanted, generation: Some(generation), listing: Some(there) });
            return Ok(generation);
        }
        if let Err(e) = nft::apply(&text).await {
            // Something that cannot be taken apart: anew, at the price of what the kernel remembers.
            tracing::warn!(error = %e, context = e.context, "our tables are made anew");
            let anew: String = wanted
                .iter()
                .map(|t| {
                    format!("add table {0} {1}\ndelete table {0} {1}\n{2}", t.family, t.name, t.replace(&[]))
                })
                .collect();
            nft::apply(&anew).await?;
        }
        let after = self.applied(wanted, generation)?;
        let listing = list().await?;
        if let Some(applied) = &mut self.tables {
            applied.listing = Some(listing);
        }
        Ok(after)
    }

    fn applied(&mut self, tables: [Table; 2], before: u32) -> Result<u32> {
        let now = nft::generation()?;
        // One transaction is one generation: more, and somebody else was there too.
        let alone = now == before.wrapping_add(1);
        self.tables = Some(Applied { tables, generation: alone.then_some(now), listing: None });
        Ok(if alone { now } else { before })
    }

    /// Begins to read what ACLs log, once a rule does.
    fn read_logs(&mut self, daemon: &str, paths: &Paths, networks: &[NetworkSpec]) {
        let mut rules = networks.iter().flat_map(|n| &n.acls).flat_map(|a| a.ingress.iter().chain(&a.egress));
        if self.log.is_some() || !rules.any(|r| r.logged) {
            return;
        }
        self.log = Some(Reader::start(daemon, &paths.0).map_err(|e| {
            tracing::info!(error = %e, context = e.context, "network ACLs log to the kernel's own log");
        }));
    }

    /// Where rules log to now.
    pub fn logs<'a>(&self, daemon: &'a str) -> Logs<'a> {
        let group = self.log.as_ref().and_then(|l| l.as_ref().ok()).map(|reader| reader.group);
        Logs { daemon, group }
    }

    /// Rules log, and not to this process.
    pub fn logs_to_kernel(&self) -> bool {
        matches!(self.log, Some(Err(())))
    }

    async fn bridge_reject(&mut self) -> Result<bool> {
        if let Some(known) = self.bridge_reject {
            return Ok(known);
        }
        let probe =
            "table bridge karst_probe { chain c { type filter hook prerouting priority 0; reject; }; }\n";
        let can = nft::accepts(probe).await?;
        if !can {
            tracing::info!(
                "this kernel cannot answer what it refuses on a bridge: ACLs of NICs drop what they reject"
            );
        }
        self.bridge_reject = Some(can);
        Ok(can)
    }

    async fn iptables(
        &mut self,
        backend: Backend,
        daemon: &str,
        paths: &Paths,
        others: &[Others],
    ) -> Result<()> {
        let listing = match list_iptables(backend).await {
            Ok(listing) => listing,
            Err(e) if !backend.legacy => {
                // A table `ip filter` made by nft itself, or no iptables on this host: not ours to understand.
                tracing::debug!(error = %e, context = e.context, "the table filter is not iptables'");
                return Ok(());
            }
            Err(e) => return Err(e),
        };
        let wanted = plan(&listing, daemon, others, backend.v6);
        let known = &self.iptables[backend.index()];
        let own = own_lines(&listing, daemon);
        if wanted.lines == own || known.as_ref().is_some_and(|(l, text)| *l == own && *text == wanted.text) {
            return Ok(());
        }
        if !wanted.lines.is_empty() {
            let mut host = paths.read_host()?;
            let flag = match (backend.v6, backend.legacy) {
                (false, false) => &mut host.iptables_nft,
                (false, true) => &mut host.iptables_legacy,
                (true, false) => &mut host.ip6tables_nft,
                (true, true) => &mut host.ip6tables_legacy,
            };
            if !std::mem::replace(flag, true) {
                paths.write_host(&host)?;
            }
        }
        restore(backend, &wanted.text).await?;
        let after = own_lines(&list_iptables(backend).await?, daemon);
        self.iptables[backend.index()] = Some((after, wanted.text));
        Ok(())
    }

    /// Takes away everything that [`Firewall::reconcile`] ever made; tells all that would not go.
    pub async fn purge(&mut self, daemon: &str, paths: &Paths) -> Result<()> {
        *self = Self::default();
        let mut failed = vec![];
        for family in ["inet", "bridge"] {
            failed.extend(nft::delete_table(family, &rules::table_name(daemon)).await.err());
        }
        failed.extend(self.purge_chains(daemon, paths).await.err());
        *self = Self::default();
        karst_model::Error::together(failed)
    }

    async fn purge_chains(&mut self, daemon: &str, paths: &Paths) -> Result<()> {
        let host = paths.read_host()?;
        for bridge in &host.firewalld {
            firewalld_leave(bridge).await;
        }
        let chains = nft::list_chains().await?;
        for v6 in [false, true] {
            let family = if v6 { "ip6" } else { "ip" };
            let recorded = if v6 { host.ip6tables_nft } else { host.iptables_nft };
            if has_table(&chains, family, "filter") || recorded {
                self.iptables(Backend { legacy: false, v6 }, daemon, paths, &[]).await?;
            }
            if legacy_in_use(v6, "filter") {
                self.iptables(Backend { legacy: true, v6 }, daemon, paths, &[]).await?;
            }
        }
        Ok(())
    }
}

/// Our chains in iptables' tables where none should be: `wanted` says whether any network is there that may need them.
pub(crate) async fn stray_chains(daemon: &str, wanted: bool) -> Result<Vec<String>> {
    if wanted {
        return Ok(vec![]);
    }
    let own = chains(daemon);
    let mut found = vec![];
    for object in nft::list_chains().await? {
        let (chain, text) = (&object["chain"], |key: &str| object["chain"][key].as_str().unwrap_or_default());
        if own.iter().any(|o| chain["name"] == o.as_str()) && chain["table"] == "filter" {
            found.push(format!("iptables chain {} ({} filter)", text("name"), text("family")));
        }
    }
    for v6 in [false, true].into_iter().filter(|v6| legacy_in_use(*v6, "filter")) {
        let lines = own_lines(&list_iptables(Backend { legacy: true, v6 }).await?, daemon);
        let chains = lines.iter().filter_map(|l| l.strip_prefix("-N "));
        found.extend(chains.map(|c| format!("legacy iptables chain {c}")));
    }
    Ok(found)
}

/// Does somebody else on this host seem to need forwarding? Their networks translate addresses, so a `masquerade`, `dnat` or
/// chain of iptables' `nat` table in a table that is not ours says so; likewise a bridge with an IPv4 address.
pub(crate) async fn others_forward() -> Result<bool> {
    let ruleset = nft::list_ruleset().await?;
    let translates = |rule: &Value| {
        rule["expr"].as_array().is_some_and(|e| {
            e.iter().any(|x| {
                ["masquerade", "snat", "dnat"].iter().any(|k| x.get(k).is_some()) || x.get("xt").is_some()
            })
        })
    };
    if legacy_in_use(false, "nat") || ruleset.iter().any(|o| translates(&o["rule"])) {
        return Ok(true);
    }
    let addresses = karst_host::link::addresses(None)?;
    Ok(karst_host::link::list()?.iter().any(|l| {
        l.kind.as_deref() == Some("bridge")
            && addresses.iter().any(|a| a.link == l.index && a.address.is_ipv4())
    }))
}

/// Are the kernel's legacy tables in use in this network namespace? (Asking `iptables-legacy` would create them.)
fn legacy_in_use(v6: bool, table: &str) -> bool {
    let names = if v6 { "/proc/net/ip6_tables_names" } else { "/proc/net/ip_tables_names" };
    std::fs::read_to_string(names).is_ok_and(|names| names.lines().any(|l| l == table))
}

async fn list_iptables(backend: Backend) -> Result<Vec<String>> {
    let out = run(backend.list()).args(["-w", "5", "-S"]).output_cap(16 << 20).ok().await?;
    Ok(String::from_utf8_lossy(&out).lines().map(str::to_owned).collect())
}

async fn restore(backend: Backend, text: &str) -> Result<()> {
    run(backend.restore()).args(["-w", "5", "--noflush"]).stdin(text).ok().await.map(drop)
}

async fn firewalld_join(bridge: &str) -> Result<()> {
    let query = run(Program::FirewallCmd)
        .args(["--zone=trusted", &format!("--query-interface={bridge}")])
        .output()
        .await?;
    if query.code == 0 {
        return Ok(());
    }
    run(Program::FirewallCmd)
        .args(["--zone=trusted", &format!("--change-interface={bridge}")])
        .ok()
        .await
        .map(drop)
}

/// firewalld forgets with its own restart, so a failure leaves nothing behind for long.
async fn firewalld_leave(bridge: &str) {
    let result = run(Program::FirewallCmd)
        .args(["--zone=trusted", &format!("--remove-interface={bridge}")])
        .output()
        .await;
    if let Err(e) = result {
        tracing::warn!(bridge, error = %e, "the bridge could not be taken out of firewalld's zone trusted");
    }
}

fn has_table(ruleset: &[Value], family: &str, name: &str) -> bool {
    ruleset.iter().any(|o| o["table"]["family"] == family && o["table"]["name"] == name)
}

/// Base chains that drop by default and belong to nobody that we know how to ask.
fn foreign_drops(ruleset: &[Value]) -> Vec<String> {
    ruleset
        .iter()
        .map(|o| &o["chain"])
        .filter(|c| c["policy"] == "drop" && (c["hook"] == "forward" || c["hook"] == "input"))
        .filter(|c| ["inet", "ip", "ip6"].iter().any(|f| c["family"] == *f))
        .filter(|c| !(c["table"] == "filter" && c["family"] != "inet") && c["table"] != "firewalld")
        .map(|c| {
            let text = |key: &str| c[key].as_str().unwrap_or_default().to_owned();
            format!(
                "the chain {:?} of the nft table {} {:?} drops by default; guests need accepts for their bridge in it",
                text("name"),
                text("family"),
                text("table")
            )
        })
        .collect()
}

/// What a listing of the filter table should become.
#[derive(Debug, PartialEq, Eq)]
struct Plan {
    /// Input of `iptables-restore --noflush`: one transaction.
    text: String,
    /// Lines of `iptables -S` that then are ours, sorted.
    lines: Vec<String>,
}

fn chains(daemon: &str) -> [String; 2] {
    [format!("KARST_{daemon}_FWD"), format!("KARST_{daemon}_IN")]
}

/// Lines of `iptables -S` that make, fill or call our chains, sorted.
fn own_lines(listing: &[String], daemon: &str) -> Vec<String> {
    let chains = chains(daemon);
    let mut own: Vec<String> = listing
        .iter()
        .filter(|line| line.split(' ').any(|word| chains.iter().any(|c| word == c)))
        .cloned()
        .collect();
    own.sort();
    own
}

fn plan(listing: &[String], daemon: &str, networks: &[Others], v6: bool) -> Plan {
    let networks: Vec<&Others> = networks.iter().filter(|o| o.concerns(v6)).collect();
    let chains = chains(daemon);
    let own = own_lines(listing, daemon);
    let foreign: Vec<&String> = listing.iter().filter(|l| !own.contains(*l)).collect();
    // A chain that accepts everything by default and has no rule of others needs nothing from us.
    let filters = |chain: &str| {
        foreign.iter().any(|l| {
            l.strip_prefix("-P ").is_some_and(|p| p.starts_with(chain) && !p.ends_with(" ACCEPT"))
                || l.starts_with(&format!("-A {chain} "))
        })
    };
    let docker = foreign.iter().any(|l| *l == "-A FORWARD -j DOCKER-USER");
    let parents = [if docker { "DOCKER-USER" } else { "FORWARD" }, "INPUT"];
    let needed = [filters("FORWARD"), filters("INPUT")].map(|n| n && !networks.is_empty());

    let mut text = String::from("*filter\n");
    let mut lines = Vec::new();
    for i in 0..2 {
        let (chain, parent) = (&chains[i], parents[i]);
        let exists = own.contains(&format!("-N {chain}"));
        if !exists && !needed[i] {
            continue;
        }
        // Declaring a chain empties it, or makes it.
        let _ = writeln!(text, ":{chain} - [0:0]");
        let call = format!("-A {parent} -j {chain}");
        let mut called = false;
        for old in own.iter().filter(|l| l.starts_with("-A ") && l.ends_with(&format!(" -j {chain}"))) {
            if needed[i] && *old == call && !called {
                called = true;
            } else {
                let _ = writeln!(text, "-D{}", &old[2..]);
            }
        }
        if !needed[i] {
            let _ = writeln!(text, "-X {chain}");
            continue;
        }
        for rule in
            networks.iter().flat_map(|n| if i == 0 { forward_rules(n, v6) } else { input_rules(n, v6) })
        {
            let line = format!("-A {chain} {rule} -j ACCEPT");
            let _ = writeln!(text, "{line}");
            lines.push(line);
        }
        if !called {
            let _ = writeln!(text, "-I {parent} 1 -j {chain}");
        }
        lines.extend([format!("-N {chain}"), call]);
    }
    text.push_str("COMMIT\n");
    lines.sort();
    Plan { text, lines }
}

/// Guests may send anywhere; to them come answers, what a forward leads there and, in a network that is not translated,
/// everything. What guests send each other is filtered too where br_netfilter is loaded, as Docker does.
fn forward_rules(network: &Others, v6: bool) -> Vec<String> {
    let bridge = &network.bridge;
    let mut rules = vec![format!("-i {bridge}")];
    if network.translated[usize::from(v6)] {
        rules.push(format!("-o {bridge} -m conntrack --ctstate RELATED,ESTABLISHED"));
        if network.forwards {
            rules.push(format!("-o {bridge} -m conntrack --ctstate DNAT"));
        }
    } else {
        rules.push(format!("-o {bridge}"));
    }
    rules
}

/// DHCP (first asked by broadcast or multicast), DNS, and neighbour discovery.
fn input_rules(network: &Others, v6: bool) -> Vec<String> {
    let bridge = &network.bridge;
    let dhcp = network.dhcp[usize::from(v6)];
    let own = match (v6, network.v4, network.v6) {
        (false, Some(own), _) => format!("-d {own}/32 -i {bridge}"),
        (true, _, Some(own)) => format!("-d {own}/128 -i {bridge}"),
        _ => return vec![],
    };
    let mut rules =
        vec![format!("{own} -p udp -m udp --dport 53"), format!("{own} -p tcp -m tcp --dport 53")];
    if network.views {
        // Questions that were led to a project's own names.
        rules.push(format!("{own} -m conntrack --ctstate DNAT"));
    }
    if dhcp {
        rules.push(format!("-i {bridge} -p udp -m udp --dport {}", if v6 { 547 } else { 67 }));
    }
    if v6 {
        rules.push(format!("-i {bridge} -p ipv6-icmp"));
    }
    rules
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn record(bridge: &str) -> Others {
        Others {
            bridge: bridge.into(),
            v4: Some("10.1.2.1".parse().unwrap()),
            v6: Some("fd42::1".parse().unwrap()),
            firewall: [true, true],
            translated: [true, false],
            dhcp: [true, true],
            forwards: false,
            views: false,
        }
    }

    fn listing(text: &str) -> Vec<String> {
        text.lines().map(|l| l.trim().to_owned()).filter(|l| !l.is_empty()).collect()
    }

    #[test]
    fn nothing_is_done_where_everything_is_accepted() {
        let open = listing("-P INPUT ACCEPT\n-P FORWARD ACCEPT\n-P OUTPUT DROP");
        let plan = plan(&open, "ab12cd", &[record("karstbr0")], false);
        assert_eq!(plan, Plan { text: "*filter\nCOMMIT\n".into(), lines: vec![] });
    }

    #[test]
    fn beside_docker() {
        let docker = listing(
            "-P INPUT ACCEPT\n-P FORWARD DROP\n-P OUTPUT ACCEPT\n-N DOCKER-USER\n-A FORWARD -j DOCKER-USER\n-A DOCKER-USER -j RETURN",
        );
        insta::assert_snapshot!(plan(&docker, "ab12cd", &[record("karstbr0")], false).text, @r"
        *filter
        :KARST_ab12cd_FWD - [0:0]
        -A KARST_ab12cd_FWD -i karstbr0 -j ACCEPT
        -A KARST_ab12cd_FWD -o karstbr0 -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
        -I DOCKER-USER 1 -j KARST_ab12cd_FWD
        COMMIT
        ");
    }

    #[test]
    fn beside_ufw_and_again_and_away() {
        let ufw = "-P INPUT DROP\n-P FORWARD DROP\n-P OUTPUT ACCEPT\n-N ufw-before-input\n-A INPUT -j ufw-before-input";
        let first = plan(&listing(ufw), "ab12cd", &[record("karstbr0")], false);
        insta::assert_snapshot!(first.text, @r"
        *filter
        :KARST_ab12cd_FWD - [0:0]
        -A KARST_ab12cd_FWD -i karstbr0 -j ACCEPT
        -A KARST_ab12cd_FWD -o karstbr0 -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
        -I FORWARD 1 -j KARST_ab12cd_FWD
        :KARST_ab12cd_IN - [0:0]
        -A KARST_ab12cd_IN -d 10.1.2.1/32 -i karstbr0 -p udp -m udp --dport 53 -j ACCEPT
        -A KARST_ab12cd_IN -d 10.1.2.1/32 -i karstbr0 -p tcp -m tcp --dport 53 -j ACCEPT
        -A KARST_ab12cd_IN -i karstbr0 -p udp -m udp --dport 67 -j ACCEPT
        -I INPUT 1 -j KARST_ab12cd_IN
        COMMIT
        ");
        // Applied, with one call lost and another doubled, Docker having come meanwhile, and another daemon's chain beside.
        let mut now = listing(ufw);
        now.extend(first.lines.iter().filter(|l| *l != "-A INPUT -j KARST_ab12cd_IN").cloned());
        now.extend(listing(
            "-A FORWARD -j KARST_ab12cd_FWD\n-A FORWARD -j DOCKER-USER\n-N KARST_ffffff_IN\n-A INPUT -j KARST_ffffff_IN",
        ));
        let again = plan(&now, "ab12cd", &[record("karstbr0")], false);
        assert_eq!(again.text.matches("-D FORWARD -j KARST_ab12cd_FWD").count(), 2, "{}", again.text);
        assert!(
            again.text.contains("-I DOCKER-USER 1") && again.text.contains("-I INPUT 1"),
            "{}",
            again.text
        );
        let gone = plan(&now, "ab12cd", &[], false);
        assert!(gone.lines.is_empty() && !gone.text.contains("ffffff"), "{}", gone.text);
        assert!(
            gone.text.contains("-X KARST_ab12cd_IN") && gone.text.contains("-X KARST_ab12cd_FWD"),
            "{}",
            gone.text
        );
    }

    #[test]
    fn an_unknown_firewall_is_named() {
        let rules = [
            json!({"chain": {"family": "inet", "table": "mine", "name": "fwd", "hook": "forward", "policy": "drop"}}),
            json!({"chain": {"family": "ip", "table": "filter", "name": "FORWARD", "hook": "forward", "policy": "drop"}}),
            json!({"chain": {"family": "inet", "table": "mine", "name": "out", "hook": "output", "policy": "drop"}}),
        ];
        let warnings = foreign_drops(&rules);
        assert_eq!(warnings.len(), 1);
        assert!(warnings[0].contains("\"fwd\"") && warnings[0].contains("\"mine\""), "{warnings:?}");
    }
}
