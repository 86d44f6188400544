//! `network acl`, `network address-set`, `network forward`, `network explain`.

use hyper::{HeaderMap, Method};
use serde_json::{Map, Value, json};

use super::{
    common::Common,
    completion::complete,
    object::{Object, config_object, create, parse_pairs},
};
use crate::{
    client::{About, Kind, Url, empty},
    context::Context,
    error::{Error, Result},
    output::{
        self, member,
        table::{FormatOption, List},
    },
};

/// `network acl ...`
#[derive(Debug, clap::Subcommand)]
pub enum Acl {
    /// List network ACLs
    #[command(visible_alias = "ls")]
    List {
        #[command(flatten)]
        format: FormatOption,
    },
    /// Create a network ACL without rules
    Create {
        /// Its name
        name: String,
        /// Keys (user.*)
        #[arg(value_name = "KEY=VALUE")]
        keys: Vec<String>,
        /// Description
        #[arg(long)]
        description: Option<String>,
    },
    /// Change its rules
    #[command(subcommand)]
    Rule(Rule),
    /// Print what its rules of state logged have logged
    #[command(alias = "show-log")]
    Log {
        /// ACL
        #[arg(add = complete(Kind::Acl))]
        name: String,
    },
    #[command(flatten)]
    Common(Common),
}

/// `network acl rule ...`
#[derive(Debug, clap::Subcommand)]
pub enum Rule {
    /// Add a rule
    Add {
        /// ACL
        #[arg(add = complete(Kind::Acl))]
        acl: String,
        /// ingress or egress
        #[arg(value_parser = ["ingress", "egress"])]
        direction: String,
        /// action, source, destination, protocol, source_port, destination_port, icmp_type, icmp_code, state, description
        #[arg(required = true, value_name = "KEY=VALUE")]
        keys: Vec<String>,
    },
    /// Remove the rules that have all of these values
    Remove {
        /// ACL
        #[arg(add = complete(Kind::Acl))]
        acl: String,
        /// ingress or egress
        #[arg(value_parser = ["ingress", "egress"])]
        direction: String,
        /// As in `add`
        #[arg(value_name = "KEY=VALUE")]
        keys: Vec<String>,
        /// Also more than one
        #[arg(long)]
        force: bool,
    },
}

/// `network address-set ...`
#[derive(Debug, clap::Subcommand)]
pub enum AddressSet {
    /// List address sets
    #[command(visible_alias = "ls")]
    List {
        #[command(flatten)]
        format: FormatOption,
    },
    /// Create an address set
    Create {
        /// Its name
        name: String,
        /// Addresses, subnets, ranges
        addresses: Vec<String>,
    },
    /// Add addresses
    Add {
        /// Address set
        #[arg(add = complete(Kind::AddressSet))]
        name: String,
        /// Addresses, subnets, ranges
        #[arg(required = true)]
        addresses: Vec<String>,
    },
    /// Remove addresses
    Remove {
        /// Address set
        #[arg(add = complete(Kind::AddressSet))]
        name: String,
        /// As they are written there
        #[arg(required = true)]
        addresses: Vec<String>,
    },
    #[command(flatten)]
    Common(Common),
}

/// `network forward ...`
#[derive(Debug, clap::Subcommand)]
pub enum Forward {
    /// List the forwards of a network
    #[command(visible_alias = "ls")]
    List {
        /// Network
        #[arg(add = complete(Kind::Network))]
        network: String,
        #[command(flatten)]
        format: FormatOption,
    },
    /// Create a forward
    Create {
        /// Network
        #[arg(add = complete(Kind::Network))]
        network: String,
        /// Address that is listened on
        listen_address: String,
        /// target_address=ADDRESS for all ports, and user.*
        #[arg(value_name = "KEY=VALUE")]
        keys: Vec<String>,
    },
    /// Show a forward as YAML
    Show {
        /// Network
        #[arg(add = complete(Kind::Network))]
        network: String,
        /// Address
        listen_address: String,
    },
    /// Change a forward in an editor, or replace it by YAML on stdin
    Edit {
        /// Network
        #[arg(add = complete(Kind::Network))]
        network: String,
        /// Address
        listen_address: String,
    },
    /// Delete a forward
    #[command(visible_alias = "rm")]
    Delete {
        /// Network
        #[arg(add = complete(Kind::Network))]
        network: String,
        /// Address
        listen_address: String,
    },
    /// Lead ports to a guest
    AddPort {
        /// Network
        #[arg(add = complete(Kind::Network))]
        network: String,
        /// Address
        listen_address: String,
        /// tcp or udp
        protocol: String,
        /// Ports and ranges, comma-separated
        listen_ports: String,
        /// Guest's address
        target_address: String,
        /// One port, or as many as are listened on; the same when absent
        target_ports: Option<String>,
    },
    /// Stop leading ports to a guest
    RemovePort {
        /// Network
        #[arg(add = complete(Kind::Network))]
        network: String,
        /// Address
        listen_address: String,
        /// tcp or udp
        protocol: String,
        /// As they were given
        listen_ports: String,
    },
}

/// `network explain`
#[derive(Debug, clap::Args)]
pub struct Explain {
    /// Instance or address
    #[arg(add = complete(Kind::Instance))]
    from: String,
    /// Instance or address
    #[arg(add = complete(Kind::Instance))]
    to: String,
    /// tcp/80, 80, udp/53 or icmp
    port: String,
}

fn acl(name: &str) -> Object {
    Object {
        url: Url::new(&["network-acls", name]),
        kind: Kind::Acl,
        name: name.to_owned(),
        fields: &["config", "description", "ingress", "egress"],
    }
}

fn set(name: &str) -> Object {
    Object {
        url: Url::new(&["network-address-sets", name]),
        kind: Kind::AddressSet,
        name: name.to_owned(),
        fields: &["config", "description", "addresses"],
    }
}

fn forward(network: &str, listen: &str) -> Object {
    Object {
        url: Url::new(&["networks", network, "forwards", listen]),
        kind: Kind::Forward,
        name: listen.to_owned(),
        fields: &["config", "description", "ports"],
    }
}

/// Reads an object, changes the list in one of its fields, and puts it back under its ETag.
async fn change_list(
    context: &Context,
    object: &Object,
    field: &str,
    change: impl FnOnce(&mut Vec<Value>) -> Result<()>,
) -> Result<()> {
    let read = object.get(context).await?;
    let mut body: Map<String, Value> = object.writable(&read.metadata);
    let mut list = body.get(field).and_then(Value::as_array).cloned().unwrap_or_default();
    change(&mut list)?;
    body.insert(field.to_owned(), Value::Array(list));
    object.put(context, body, read.etag.as_deref()).await
}

fn used_by(object: &Value) -> String {
    object["used_by"].as_array().map_or(0, Vec::len).to_string()
}

impl Acl {
    /// Runs it.
    pub async fn run(self, context: &Context) -> Result<()> {
        match self {
            Self::List { format } => {
                let url = Url::new(&["network-acls"]).with("recursion", 1);
                let objects = context.client.get(&url).await?.metadata;
                let list = List::of(&["NAME", "DESCRIPTION", "RULES", "USED BY"], objects, |acl| {
                    let count = |d: &str| acl[d].as_array().map_or(0, Vec::len);
                    let rules = count("ingress") + count("egress");
                    vec![member(acl, "name"), member(acl, "description"), rules.to_string(), used_by(acl)]
                });
                list.print(format.format)
            }
            Self::Create { name, keys, description } => {
                let body = json!({"name": name, "config": config_object(&keys)?,
                    "description": description.unwrap_or_default()});
                create(context, &Url::new(&["network-acls"]), body, format!("creating network ACL {name}"))
                    .await
            }
            Self::Rule(Rule::Add { acl: name, direction, keys }) => {
                let rule = config_object(&keys)?;
                change_list(context, &acl(&name), &direction, |list| {
                    list.push(rule);
                    Ok(())
                })
                .await
            }
            Self::Rule(Rule::Remove { acl: name, direction, keys, force }) => {
                let wanted = parse_pairs(&keys)?;
                change_list(context, &acl(&name), &direction, |list| remove(list, &wanted, force)).await
            }
            Self::Log { name } => {
                let client = &context.client;
                let url = acl(&name).url.join("log");
                let work = async {
                    let response = client.send(Method::GET, &url, HeaderMap::new(), empty()).await?;
                    client.bytes(response).await
                };
                output::write(&work.await.about(client, Kind::Acl, &name)?)
            }
            Self::Common(command) => command.run(context, acl).await,
        }
    }
}

/// Removes the rules that have all the values.
fn remove(list: &mut Vec<Value>, wanted: &[(String, String)], force: bool) -> Result<()> {
    let fits = |rule: &Value| wanted.iter().all(|(key, value)| member(rule, key) == *value);
    match list.iter().filter(|r| fits(r)).count() {
        0 => Err(Error::Local("no rule has these values".into())),
        n if n > 1 && !force => {
            Err(Error::Local(format!("{n} rules have these values: name more of them, or give --force")))
        }
        _ => {
            list.retain(|r| !fits(r));
            Ok(())
        }
    }
}

impl AddressSet {
    /// Runs it.
    pub async fn run(self, context: &Context) -> Result<()> {
        match self {
            Self::List { format } => {
                let url = Url::new(&["network-address-sets"]).with("recursion", 1);
                let objects = context.client.get(&url).await?.metadata;
                let list = List::of(&["NAME", "DESCRIPTION", "ADDRESSES", "USED BY"], objects, |set| {
                    let addresses = set["addresses"].as_array().into_iter().flatten().map(output::scalar);
                    let addresses: Vec<String> = addresses.collect();
                    vec![member(set, "name"), member(set, "description"), addresses.join("\n"), used_by(set)]
                });
                list.print(format.format)
            }
            Self::Create { name, addresses } => {
                let body = json!({"name": name, "addresses": addresses});
                let url = Url::new(&["network-address-sets"]);
                create(context, &url, body, format!("creating address set {name}")).await
            }
            Self::Add { name, addresses } => {
                change_list(context, &set(&name), "addresses", |list| {
                    list.extend(addresses.into_iter().map(Value::from));
                    Ok(())
                })
                .await
            }
            Self::Remove { name, addresses } => {
                change_list(context, &set(&name), "addresses", |list| {
                    for address in &addresses {
                        let before = list.len();
                        list.retain(|a| a != address);
                        if list.len() == before {
                            return Err(Error::Local(format!("address set \"{name}\" has no \"{address}\"")));
                        }
                    }
                    Ok(())
                })
                .await
            }
            Self::Common(command) => command.run(context, set).await,
        }
    }
}

impl Forward {
    /// Runs it.
    pub async fn run(self, context: &Context) -> Result<()> {
        match self {
            Self::List { network, format } => {
                let url = Url::new(&["networks", &network, "forwards"]).with("recursion", 1);
                let answer =
                    context.client.get(&url).await.about(&context.client, Kind::Network, &network)?;
                let columns = &["LISTEN ADDRESS", "DESCRIPTION", "DEFAULT TARGET", "PORTS"];
                let list = List::of(columns, answer.metadata, |f| {
                    let ports = f["ports"].as_array().map_or(0, Vec::len).to_string();
                    let target = member(&f["config"], "target_address");
                    vec![member(f, "listen_address"), member(f, "description"), target, ports]
                });
                list.print(format.format)
            }
            Self::Create { network, listen_address, keys } => {
                let body = json!({"listen_address": listen_address, "config": config_object(&keys)?});
                let url = Url::new(&["networks", &network, "forwards"]);
                create(context, &url, body, format!("creating forward {listen_address}")).await
            }
            Self::Show { network, listen_address } => forward(&network, &listen_address).show(context).await,
            Self::Edit { network, listen_address } => forward(&network, &listen_address).edit(context).await,
            Self::Delete { network, listen_address } => {
                forward(&network, &listen_address).delete(context).await
            }
            Self::AddPort {
                network,
                listen_address,
                protocol,
                listen_ports,
                target_address,
                target_ports,
            } => {
                let port = json!({"protocol": protocol, "listen_port": listen_ports,
                    "target_address": target_address, "target_port": target_ports.unwrap_or_default()});
                change_list(context, &forward(&network, &listen_address), "ports", |list| {
                    list.push(port);
                    Ok(())
                })
                .await
            }
            Self::RemovePort { network, listen_address, protocol, listen_ports } => {
                let wanted = [("protocol".to_owned(), protocol), ("listen_port".to_owned(), listen_ports)];
                change_list(context, &forward(&network, &listen_address), "ports", |list| {
                    remove(list, &wanted, false)
                })
                .await
            }
        }
    }
}

impl Explain {
    /// Runs it; exit code 1 when the packet does not arrive.
    pub async fn run(self, context: &Context) -> Result<()> {
        let url = Url::new(&["karst", "network", "explain"])
            .with("from", &self.from)
            .with("to", &self.to)
            .with("port", &self.port);
        let answer = context.client.get(&url).await?.metadata;
        output::print(&story(&self.from, &self.to, &self.port, &answer))?;
        if answer["passes"] == true { Ok(()) } else { Err(Error::Exit(1)) }
    }
}

/// The way of a packet, for people: each decision, the deciding one last.
fn story(from: &str, to: &str, port: &str, answer: &Value) -> String {
    use std::fmt::Write as _;
    let passes = answer["passes"] == true;
    let mut out = format!("{from} -> {to} {port}: {}\n", if passes { "passes" } else { "does not pass" });
    for step in answer["steps"].as_array().into_iter().flatten() {
        let direction = member(step, "direction");
        let why = match member(step, "by").as_str() {
            "rule" => {
                let number = step["number"].as_u64().unwrap_or_default();
                format!("rule {direction}[{number}] of network ACL {}", member(step, "acl"))
            }
            "default" => format!("no rule matches: security.acls.default.{direction}.action"),
            _ => member(step, "what"),
        };
        let _ = writeln!(out, "  {}: {} ({why})", member(step, "place"), member(step, "action"));
    }
    if answer["steps"].as_array().is_none_or(Vec::is_empty) {
        out.push_str("  no ACL, filter or forward is on the way\n");
    }
    if passes && member(answer, "destination") != to {
        let port = answer["port"].as_u64().map(|p| format!(" port {p}")).unwrap_or_default();
        let _ = writeln!(out, "  it arrives at {}{port}", member(answer, "destination"));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_way_of_a_packet() {
        let answer = json!({"passes": false, "destination": "10.1.2.5", "port": 80, "steps": [
            {"place": "NIC of c1 on br0", "action": "allow", "by": "rule", "acl": "web", "direction": "egress", "number": 2},
            {"place": "NIC of c2 on br0", "action": "drop", "by": "default", "direction": "ingress"}]});
        assert_eq!(
            story("c1", "c2", "80", &answer),
            "c1 -> c2 80: does not pass\n  NIC of c1 on br0: allow (rule egress[2] of network ACL web)\n  \
             NIC of c2 on br0: drop (no rule matches: security.acls.default.ingress.action)\n"
        );
        let free = json!({"passes": true, "destination": "10.1.2.5", "port": 80, "steps": []});
        assert!(story("c1", "192.0.2.1", "80", &free).ends_with("arrives at 10.1.2.5 port 80\n"));
    }

    #[test]
    fn rules_go_by_their_values() {
        let mut list = vec![json!({"action": "allow", "protocol": "tcp"}), json!({"action": "allow"})];
        let pair = |k: &str, v: &str| (k.to_owned(), v.to_owned());
        assert!(remove(&mut list, &[pair("action", "drop")], false).is_err());
        assert!(remove(&mut list, &[pair("action", "allow")], false).is_err());
        remove(&mut list, &[pair("action", "allow"), pair("protocol", "tcp")], false).unwrap();
        assert_eq!(list, [json!({"action": "allow"})]);
        remove(&mut list, &[], true).unwrap();
        assert!(list.is_empty());
    }
}
