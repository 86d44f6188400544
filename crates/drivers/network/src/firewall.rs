//! The firewall of all networks of this daemon: its own nft table, and, where somebody else's firewall drops by default,
//! accepts in *that* firewall. An accept in a table of ours would not do: netfilter runs every base chain of a hook, and one
//! drop is final.
//!
//! - iptables (Docker, ufw, hand-made rules), nft and legacy tables alike: two chains of ours, called from `INPUT` and from
//!   `DOCKER-USER` where Docker has it in use, otherwise from `FORWARD`. Docker and ufw rebuild their own chains, not these.
//! - firewalld: the bridge joins the zone `trusted`, at run time only.
//! - Any other base chain that drops by default is named in a warning.

use crate::{
    record::{Paths, Record},
    render,
};
use karst_host::{Program, nft, run};
use karst_model::Result;
use serde_json::Value;
use std::{collections::BTreeSet, fmt::Write};

/// What was seen and done last.
#[derive(Debug, Default)]
pub(crate) struct Firewall {
    /// Generation of the ruleset at which everything was found right, and what was wanted then.
    settled: Option<(u32, Vec<Record>)>,
    /// The daemon's table as nft listed it after it was applied, and the text that was applied.
    table: Option<(Vec<Value>, String)>,
    /// Our iptables lines as they were listed after being applied, per backend, with the text that was applied.
    iptables: [Option<(Vec<String>, String)>; 2],
    /// Base chains of others that drop what guests send or receive.
    pub warnings: Vec<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Backend {
    Nft,
    Legacy,
}

impl Backend {
    fn list(self) -> Program {
        match self {
            Self::Nft => Program::IptablesNft,
            Self::Legacy => Program::IptablesLegacy,
        }
    }
    fn restore(self) -> Program {
        match self {
            Self::Nft => Program::IptablesNftRestore,
            Self::Legacy => Program::IptablesLegacyRestore,
        }
    }
}

impl Firewall {
    /// Makes the host's rules what `records` want. Microseconds when nobody changed anything since the last time.
    pub async fn reconcile(&mut self, daemon: &str, paths: &Paths, records: &[Record]) -> Result<()> {
        let legacy = legacy_in_use("filter");
        let generation = nft::generation()?;
        if self.settled.as_ref().is_some_and(|(g, r)| *g == generation && r == records) {
            // Legacy tables have no generation: where they are in use, they alone are read each time.
            if legacy {
                self.iptables(Backend::Legacy, daemon, paths, records).await?;
            }
            return Ok(());
        }
        self.settled = None;
        let ruleset = nft::list_ruleset().await?;
        self.own_table(daemon, records, &ruleset).await?;
        let mut host = paths.read_host()?;
        if has_table(&ruleset, "ip", "filter") {
            self.iptables(Backend::Nft, daemon, paths, records).await?;
        }
        if legacy {
            self.iptables(Backend::Legacy, daemon, paths, records).await?;
        }
        let mut warnings = Vec::new();
        let bridges: BTreeSet<String> = records.iter().map(|r| r.bridge.clone()).collect();
        if ["inet", "ip", "ip6"].iter().any(|family| has_table(&ruleset, family, "firewalld")) {
            host = paths.read_host()?;
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
        } else if !host.firewalld.is_empty() && records.is_empty() {
            // firewalld is gone, and what it knew at run time with it.
            host.firewalld.clear();
            paths.write_host(&host)?;
        }
        if !records.is_empty() {
            warnings.extend(foreign_drops(&ruleset));
        }
        for warning in warnings.iter().filter(|w| !self.warnings.contains(w)) {
            tracing::warn!("{warning}");
        }
        self.warnings = warnings;
        // The generation from before the listing: where something was changed since, by us or by others, the next call lists
        // once more, and only what was found right at one generation counts as settled.
        self.settled = Some((generation, records.to_vec()));
        Ok(())
    }

    async fn own_table(&mut self, daemon: &str, records: &[Record], ruleset: &[Value]) -> Result<()> {
        let wanted = render::nft_table(daemon, records);
        let name = render::table_name(daemon);
        let found = table_objects(ruleset, "inet", &name);
        // Only a comparison with what nft itself listed after applying is independent of how a version of nft writes rules.
        if self.table.as_ref().is_some_and(|(listed, text)| *listed == found && *text == wanted) {
            return Ok(());
        }
        if found.is_empty() && !wanted.contains("chain ") {
            self.table = Some((found, wanted));
            return Ok(());
        }
        nft::apply(&wanted).await?;
        self.table = Some((table_objects(&nft::list_ruleset().await?, "inet", &name), wanted));
        Ok(())
    }

    async fn iptables(
        &mut self,
        backend: Backend,
        daemon: &str,
        paths: &Paths,
        records: &[Record],
    ) -> Result<()> {
        let listing = match list_iptables(backend).await {
            Ok(listing) => listing,
            Err(e) if backend == Backend::Nft => {
                // A table `ip filter` made by nft itself, or no iptables on this host: not ours to understand.
                tracing::debug!(error = %e, context = e.context, "the table ip filter is not iptables'");
                return Ok(());
            }
            Err(e) => return Err(e),
        };
        let wanted = plan(&listing, daemon, records);
        let known = &self.iptables[backend as usize];
        let own = own_lines(&listing, daemon);
        if wanted.lines == own || known.as_ref().is_some_and(|(l, text)| *l == own && *text == wanted.text) {
            return Ok(());
        }
        if !wanted.lines.is_empty() {
            let mut host = paths.read_host()?;
            let flag = match backend {
                Backend::Nft => &mut host.iptables_nft,
                Backend::Legacy => &mut host.iptables_legacy,
            };
            if !std::mem::replace(flag, true) {
                paths.write_host(&host)?;
            }
        }
        restore(backend, &wanted.text).await?;
        let after = own_lines(&list_iptables(backend).await?, daemon);
        self.iptables[backend as usize] = Some((after, wanted.text));
        Ok(())
    }

    /// Takes away everything that [`Firewall::reconcile`] ever made.
    pub async fn purge(&mut self, daemon: &str, paths: &Paths) -> Result<()> {
        *self = Self::default();
        let host = paths.read_host()?;
        nft::delete_table("inet", &render::table_name(daemon)).await?;
        let in_nft = has_table(&nft::list_ruleset().await?, "ip", "filter");
        for (backend, here) in
            [(Backend::Nft, in_nft || host.iptables_nft), (Backend::Legacy, legacy_in_use("filter"))]
        {
            if here {
                self.iptables(backend, daemon, paths, &[]).await?;
            }
        }
        for bridge in &host.firewalld {
            firewalld_leave(bridge).await;
        }
        *self = Self::default();
        Ok(())
    }
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
    if legacy_in_use("nat") || ruleset.iter().any(|o| translates(&o["rule"])) {
        return Ok(true);
    }
    let addresses = karst_host::link::addresses(None)?;
    Ok(karst_host::link::list()?.iter().any(|l| {
        l.kind.as_deref() == Some("bridge")
            && addresses.iter().any(|a| a.link == l.index && a.address.is_ipv4())
    }))
}

/// Are the kernel's legacy tables in use in this network namespace? (Asking `iptables-legacy` would create them.)
fn legacy_in_use(table: &str) -> bool {
    std::fs::read_to_string("/proc/net/ip_tables_names").is_ok_and(|names| names.lines().any(|l| l == table))
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

/// Objects of one table without their handles, which change with each application.
fn table_objects(ruleset: &[Value], family: &str, name: &str) -> Vec<Value> {
    ruleset
        .iter()
        .filter(|object| {
            object.as_object().is_some_and(|o| {
                o.iter().any(|(kind, v)| {
                    v["family"] == family && (v["table"] == name || (kind == "table" && v["name"] == name))
                })
            })
        })
        .map(|object| {
            let mut object = object.clone();
            for value in object.as_object_mut().into_iter().flat_map(|o| o.values_mut()) {
                if let Some(fields) = value.as_object_mut() {
                    fields.remove("handle");
                }
            }
            object
        })
        .collect()
}

/// Base chains that drop by default and belong to nobody that we know how to ask.
fn foreign_drops(ruleset: &[Value]) -> Vec<String> {
    ruleset
        .iter()
        .map(|o| &o["chain"])
        .filter(|c| c["policy"] == "drop" && (c["hook"] == "forward" || c["hook"] == "input"))
        .filter(|c| c["family"] == "inet" || c["family"] == "ip")
        .filter(|c| !(c["table"] == "filter" && c["family"] == "ip") && c["table"] != "firewalld")
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

fn plan(listing: &[String], daemon: &str, records: &[Record]) -> Plan {
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
    let needed = [filters("FORWARD"), filters("INPUT")].map(|n| n && !records.is_empty());

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
        for rule in records.iter().flat_map(|r| if i == 0 { forward_rules(r) } else { input_rules(r) }) {
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

/// Guests may send anywhere; to them come answers and, in a network that is not translated, everything. What guests send
/// each other is filtered too where br_netfilter is loaded, as Docker does.
fn forward_rules(record: &Record) -> Vec<String> {
    let bridge = &record.bridge;
    let mut rules = vec![format!("-i {bridge}")];
    rules.push(if record.spec.nat {
        format!("-o {bridge} -m conntrack --ctstate RELATED,ESTABLISHED")
    } else {
        format!("-o {bridge}")
    });
    rules
}

/// DHCP (first asked by broadcast) and DNS.
fn input_rules(record: &Record) -> Vec<String> {
    let (bridge, Some(net)) = (&record.bridge, record.spec.ipv4) else {
        return vec![];
    };
    let own = format!("-d {}/32 -i {bridge}", net.addr());
    let mut rules =
        vec![format!("{own} -p udp -m udp --dport 53"), format!("{own} -p tcp -m tcp --dport 53")];
    if record.spec.dhcp {
        rules.push(format!("-i {bridge} -p udp -m udp --dport 67"));
    }
    rules
}

#[cfg(test)]
mod tests {
    use super::*;
    use karst_model::network::BridgeSpec;
    use serde_json::json;

    fn record(bridge: &str) -> Record {
        Record {
            id: uuid::Uuid::from_u128(1).into(),
            bridge: bridge.into(),
            spec: BridgeSpec {
                ipv4: Some("10.1.2.1/24".parse().unwrap()),
                nat: true,
                dhcp: true,
                dhcp_range: None,
                domain: "karst".into(),
                mtu: None,
            },
            removing: false,
        }
    }

    fn listing(text: &str) -> Vec<String> {
        text.lines().map(|l| l.trim().to_owned()).filter(|l| !l.is_empty()).collect()
    }

    #[test]
    fn nothing_is_done_where_everything_is_accepted() {
        let open = listing("-P INPUT ACCEPT\n-P FORWARD ACCEPT\n-P OUTPUT DROP");
        let plan = plan(&open, "ab12cd", &[record("karstbr0")]);
        assert_eq!(plan, Plan { text: "*filter\nCOMMIT\n".into(), lines: vec![] });
    }

    #[test]
    fn beside_docker() {
        let docker = listing(
            "-P INPUT ACCEPT\n-P FORWARD DROP\n-P OUTPUT ACCEPT\n-N DOCKER-USER\n-A FORWARD -j DOCKER-USER\n-A DOCKER-USER -j RETURN",
        );
        insta::assert_snapshot!(plan(&docker, "ab12cd", &[record("karstbr0")]).text, @r"
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
        let first = plan(&listing(ufw), "ab12cd", &[record("karstbr0")]);
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
        let again = plan(&now, "ab12cd", &[record("karstbr0")]);
        assert_eq!(again.text.matches("-D FORWARD -j KARST_ab12cd_FWD").count(), 2, "{}", again.text);
        assert!(
            again.text.contains("-I DOCKER-USER 1") && again.text.contains("-I INPUT 1"),
            "{}",
            again.text
        );
        let gone = plan(&now, "ab12cd", &[]);
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
