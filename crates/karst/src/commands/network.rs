//! `network`.

use hyper::Method;
use serde_json::{Value, json};

use super::{
    common::Common,
    completion::complete,
    network_firewall::{Acl, AddressSet, Explain, Forward},
    object::{Object, config_object, create},
};
use crate::{
    client::{About, Kind, Url},
    context::Context,
    error::Result,
    output::{
        self, member,
        table::{FormatOption, List},
        units, yes_no,
    },
};

/// `network ...`
#[derive(Debug, clap::Subcommand)]
pub enum Network {
    /// List networks
    #[command(visible_alias = "ls")]
    List {
        #[command(flatten)]
        format: FormatOption,
    },
    /// Create a network
    Create {
        /// Its name
        name: String,
        /// Its keys
        #[arg(value_name = "KEY=VALUE")]
        keys: Vec<String>,
        /// bridge, macvlan, physical, ...
        #[arg(short = 't', long = "type", value_name = "TYPE")]
        kind: Option<String>,
        /// Description
        #[arg(long)]
        description: Option<String>,
    },
    /// Show what a network does now: addresses, traffic, bridge
    Info {
        /// Its name
        #[arg(add = complete(Kind::Network))]
        name: String,
    },
    /// Make a network on its host
    Start {
        /// Its name
        #[arg(add = complete(Kind::Network))]
        name: String,
    },
    /// Take a network from its host; guests that run on it reach nothing until it is started
    Stop {
        /// Its name
        #[arg(add = complete(Kind::Network))]
        name: String,
    },
    /// Say whether a network begins with its host
    Autostart {
        /// Its name
        #[arg(add = complete(Kind::Network))]
        name: String,
        /// It does not
        #[arg(long)]
        disable: bool,
    },
    /// List the addresses that are given out
    ListLeases {
        /// Network
        #[arg(add = complete(Kind::Network))]
        name: String,
        #[command(flatten)]
        format: FormatOption,
    },
    /// List the addresses of all networks and what has them
    ListAllocations {
        #[command(flatten)]
        format: FormatOption,
        /// Of all projects
        #[arg(long)]
        all_projects: bool,
    },
    /// Network ACLs: what guests may send and get
    #[command(subcommand)]
    Acl(Acl),
    /// Sets of addresses that ACLs name
    #[command(subcommand)]
    AddressSet(AddressSet),
    /// Ports of the host that lead to guests
    #[command(subcommand)]
    Forward(Forward),
    /// Say whether a connection would come about, and which rule decides
    Explain(Explain),
    #[command(flatten)]
    Common(Common),
}

fn network(name: &str) -> Object {
    Object {
        url: Url::new(&["networks", name]),
        kind: Kind::Network,
        name: name.to_owned(),
        fields: &["config", "description"],
    }
}

impl Network {
    /// Runs it.
    pub async fn run(self, context: &Context) -> Result<()> {
        let client = &context.client;
        match self {
            Self::List { format } => {
                let objects = client.get(&Url::new(&["networks"]).with("recursion", 1)).await?.metadata;
                list(objects).print(format.format)
            }
            Self::Create { name, keys, kind, description } => {
                let mut body = json!({"name": name, "config": config_object(&keys)?});
                if let Some(kind) = kind {
                    body["type"] = json!(kind);
                }
                if let Some(description) = description {
                    body["description"] = json!(description);
                }
                create(context, &Url::new(&["networks"]), body, format!("creating network {name}")).await
            }
            Self::Info { name } => {
                let answer = client.get(&network(&name).url.join("state")).await.about(
                    client,
                    Kind::Network,
                    &name,
                )?;
                output::print(&info(&name, &answer.metadata))
            }
            Self::Start { name } => set_life(context, &name, json!({"active": true})).await,
            Self::Stop { name } => set_life(context, &name, json!({"active": false})).await,
            Self::Autostart { name, disable } => {
                set_life(context, &name, json!({"autostart": !disable})).await
            }
            Self::ListAllocations { format, all_projects } => {
                let url = Url::new(&["network-allocations"]);
                let url = if all_projects { url.with("all-projects", true) } else { url };
                let columns = &["USED BY", "ADDRESS", "TYPE", "NETWORK", "NAT", "MAC ADDRESS"];
                let list = List::of(columns, client.get(&url).await?.metadata, |a| {
                    ["used_by", "addresses", "type", "network", "nat", "hwaddr"]
                        .map(|field| member(a, field))
                        .to_vec()
                });
                list.print(format.format)
            }
            Self::ListLeases { name, format } => {
                let answer = client.get(&network(&name).url.join("leases")).await.about(
                    client,
                    Kind::Network,
                    &name,
                )?;
                let columns = &["HOSTNAME", "MAC ADDRESS", "IP ADDRESS", "TYPE"];
                let list = List::of(columns, answer.metadata, |lease| {
                    let kind = member(lease, "type").to_uppercase();
                    vec![member(lease, "hostname"), member(lease, "hwaddr"), member(lease, "address"), kind]
                });
                list.print(format.format)
            }
            Self::Acl(command) => command.run(context).await,
            Self::AddressSet(command) => command.run(context).await,
            Self::Forward(command) => command.run(context).await,
            Self::Explain(command) => command.run(context).await,
            Self::Common(command) => command.run(context, network).await,
        }
    }
}

/// Says what a network is to be: there or not, begun with its host or not.
async fn set_life(context: &Context, name: &str, life: Value) -> Result<()> {
    let client = &context.client;
    let answer = client.change(Method::PUT, &Url::new(&["karst", "networks", name]), &life, None).await;
    answer.about(client, Kind::Network, name).map(drop)
}

fn list(objects: Value) -> List {
    let columns = &["NAME", "TYPE", "MANAGED", "IPV4", "IPV6", "DESCRIPTION", "USED BY", "STATE"];
    let mut list = List::of(columns, objects, |network| {
        vec![
            member(network, "name"),
            member(network, "type"),
            yes_no(network["managed"].as_bool().unwrap_or_default()),
            member(&network["config"], "ipv4.address"),
            member(&network["config"], "ipv6.address"),
            member(network, "description"),
            network["used_by"].as_array().map_or(0, Vec::len).to_string(),
            member(network, "status").to_uppercase(),
        ]
    });
    list.rows.sort();
    list
}

/// What a network does, for people.
fn info(name: &str, state: &Value) -> String {
    use std::fmt::Write as _;
    let mut out = String::new();
    let _ = writeln!(out, "Name: {name}");
    for (title, key) in [("MAC address", "hwaddr"), ("MTU", "mtu"), ("State", "state"), ("Type", "type")] {
        let value = member(state, key);
        if !value.is_empty() {
            let _ = writeln!(out, "{title}: {value}");
        }
    }
    let addresses = state["addresses"].as_array().map(Vec::as_slice).unwrap_or_default();
    if !addresses.is_empty() {
        out.push_str("\nIP addresses:\n");
    }
    for address in addresses {
        let parts = [
            member(address, "family"),
            member(address, "address"),
            member(address, "netmask"),
            member(address, "scope"),
        ];
        let _ = writeln!(out, "  {}: {}/{} ({})", parts[0], parts[1], parts[2], parts[3]);
    }
    if let Some(counters) = state["counters"].as_object() {
        out.push_str("\nNetwork usage:\n");
        for (title, key) in [("Bytes received", "bytes_received"), ("Bytes sent", "bytes_sent")] {
            let value = counters.get(key).and_then(Value::as_u64).unwrap_or_default();
            let _ = writeln!(out, "  {title}: {}", units::bytes(value));
        }
        for (title, key) in [("Packets received", "packets_received"), ("Packets sent", "packets_sent")] {
            let value = counters.get(key).and_then(Value::as_u64).unwrap_or_default();
            let _ = writeln!(out, "  {title}: {value}");
        }
    }
    if let Some(bridge) = state["bridge"].as_object() {
        let ports: Vec<String> = bridge
            .get("upper_devices")
            .and_then(Value::as_array)
            .into_iter()
            .flatten()
            .map(output::scalar)
            .collect();
        let _ =
            writeln!(out, "\nBridge:\n  ID: {}", bridge.get("id").map(output::scalar).unwrap_or_default());
        if !ports.is_empty() {
            let _ = writeln!(out, "  Ports: {}", ports.join(", "));
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn networks() {
        let objects = json!([
            {"name": "lo", "type": "loopback", "managed": false, "config": {}, "used_by": null},
            {"name": "karstbr0", "type": "bridge", "managed": true, "status": "Created",
             "config": {"ipv4.address": "10.1.2.1/24", "ipv6.address": "none"}, "used_by": ["/1.0/instances/c1"]}
        ]);
        assert_eq!(
            list(objects).render("csv".parse().unwrap()).unwrap(),
            "karstbr0,bridge,YES,10.1.2.1/24,none,,1,CREATED\nlo,loopback,NO,,,,0,\n"
        );
    }

    #[test]
    fn state_for_people() {
        let state = json!({"hwaddr": "00:16:3e:00:00:01", "mtu": 1500, "state": "up", "type": "broadcast",
            "addresses": [{"family": "inet", "address": "10.1.2.1", "netmask": "24", "scope": "global"}],
            "counters": {"bytes_received": 2048, "bytes_sent": 10, "packets_received": 3, "packets_sent": 1},
            "bridge": {"id": "8000.00163e000001", "upper_devices": ["veth1"]}});
        insta::assert_snapshot!(info("karstbr0", &state));
    }
}
