//! `config`: keys and devices of instances, keys of the server.

use serde_json::{Value, json};

use super::{
    completion::complete,
    device::{Device, Owner},
    object::{Object, parse_settings},
    template::{Metadata, Template},
};
use crate::{
    client::{Kind, Url},
    context::Context,
    error::{Error, Result},
    output::{
        self, member,
        table::{FormatOption, List},
        to_yaml,
    },
};

/// Fields of an instance that PUT takes.
const FIELDS: &[&str] =
    &["architecture", "config", "description", "devices", "ephemeral", "profiles", "stateful"];

/// `config ...`
#[derive(Debug, clap::Subcommand)]
pub enum Config {
    /// Print the value of a key
    Get {
        /// INSTANCE KEY, or only KEY for the server
        #[arg(required = true, num_args = 1..=2, value_names = ["INSTANCE", "KEY"], add = complete(Kind::Instance))]
        words: Vec<String>,
        /// With what the profiles give
        #[arg(short, long)]
        expanded: bool,
        /// A property of the instance itself, such as description
        #[arg(short, long)]
        property: bool,
    },
    /// Set keys; live where the key allows it
    Set {
        /// INSTANCE KEY=VALUE..., or only KEY=VALUE... for the server; the value "-" is read from stdin
        #[arg(required = true, value_names = ["INSTANCE", "KEY=VALUE"], num_args = 1.., add = complete(Kind::Instance))]
        words: Vec<String>,
        /// Properties of the instance itself, such as description
        #[arg(short, long)]
        property: bool,
    },
    /// Remove a key
    Unset {
        /// INSTANCE KEY, or only KEY for the server
        #[arg(required = true, num_args = 1..=2, value_names = ["INSTANCE", "KEY"], add = complete(Kind::Instance))]
        words: Vec<String>,
        /// A property of the instance itself
        #[arg(short, long)]
        property: bool,
    },
    /// Show an instance's configuration as YAML, or the server's
    Show {
        /// Instance
        #[arg(add = complete(Kind::Instance))]
        instance: Option<String>,
        /// With what the profiles give
        #[arg(short, long)]
        expanded: bool,
    },
    /// Change an instance's configuration in an editor, or replace it by YAML on stdin
    Edit {
        /// Instance; the server if none
        #[arg(add = complete(Kind::Instance))]
        instance: Option<String>,
    },
    /// List the keys that the server knows, with what they do
    Keys {
        /// Only those that contain this
        pattern: Option<String>,
        #[command(flatten)]
        format: FormatOption,
    },
    /// Devices of instances
    #[command(subcommand)]
    Device(Device),
    /// What an instance has of its image's metadata
    #[command(subcommand)]
    Metadata(Metadata),
    /// Templates of files that are made when an instance is created, copied, renamed or started
    #[command(subcommand)]
    Template(Template),
}

/// The keys of `/1.0/metadata/configuration`, flat.
fn keys(metadata: &Value, pattern: &str) -> Vec<Value> {
    let mut all = vec![];
    for (entity, groups) in metadata["configs"].as_object().into_iter().flatten() {
        for group in groups.as_object().into_iter().flat_map(|g| g.values()) {
            for key in group["keys"].as_array().into_iter().flatten() {
                for (name, about) in
                    key.as_object().into_iter().flatten().filter(|(n, _)| n.contains(pattern))
                {
                    let mut row = about.clone();
                    row["name"] = json!(name);
                    row["entity"] = json!(entity);
                    all.push(row);
                }
            }
        }
    }
    all.sort_by_key(|key| (member(key, "entity"), member(key, "name")));
    all
}

/// An instance as an object with fields.
pub fn instance(name: &str) -> Object {
    Object {
        url: super::lifecycle::instance_url(name),
        kind: Kind::Instance,
        name: name.to_owned(),
        fields: FIELDS,
    }
}

/// The server's own configuration.
fn server() -> Object {
    Object { url: Url::new(&[]), kind: Kind::Instance, name: "server".to_owned(), fields: &["config"] }
}

/// The object and the rest of `[INSTANCE] REST...`.
fn target(words: &[String], server_takes: usize) -> (Object, &[String]) {
    if words.len() <= server_takes { (server(), words) } else { (instance(&words[0]), &words[1..]) }
}

impl Config {
    /// Runs it.
    pub async fn run(self, context: &Context) -> Result<()> {
        match self {
            Self::Get { words, expanded, property } => {
                let (object, rest) = target(&words, 1);
                if expanded && !property {
                    let value = object.get(context).await?.metadata;
                    return output::line(&member(&value["expanded_config"], &rest[0]));
                }
                object.print_key(context, &rest[0], property).await
            }
            Self::Set { words, property } => {
                let of_server = words[0].contains('=') || (words.len() == 2 && !words[1].contains('='));
                let (object, rest) = match of_server {
                    true => (server(), words.as_slice()),
                    false => (instance(&words[0]), &words[1..]),
                };
                if rest.is_empty() {
                    return Err(Error::Usage(
                        "no KEY=VALUE given (karst config set --help shows how)".to_owned(),
                    ));
                }
                let settings = parse_settings(rest)?;
                let keys: Vec<String> = settings.iter().map(|(key, _)| key.clone()).collect();
                object.set(context, settings, property).await?;
                if !of_server && !property {
                    super::info::tell_waiting(context, &words[0], &keys).await;
                }
                Ok(())
            }
            Self::Unset { words, property } => {
                let (object, rest) = target(&words, 1);
                object.unset(context, &rest[0], property).await?;
                if words.len() == 2 && !property {
                    super::info::tell_waiting(context, &words[0], rest).await;
                }
                Ok(())
            }
            Self::Show { instance: None, .. } => {
                let answer = server().get(context).await?;
                output::print(&to_yaml(&json!({"config": answer.metadata["config"]}))?)
            }
            Self::Show { instance: Some(name), expanded } => {
                let object = instance(&name);
                let answer = object.get(context).await?;
                let mut shown = object.writable(&answer.metadata);
                if expanded {
                    shown.insert("config".to_owned(), answer.metadata["expanded_config"].clone());
                    shown.insert("devices".to_owned(), answer.metadata["expanded_devices"].clone());
                }
                output::print(&to_yaml(&shown.into())?)
            }
            Self::Edit { instance: None } => server().edit(context).await,
            Self::Edit { instance: Some(name) } => instance(&name).edit(context).await,
            Self::Keys { pattern, format } => {
                let answer = context.client.get(&Url::new(&["metadata", "configuration"])).await?;
                let columns = &["KEY", "OF", "FOR", "LIVE", "DEFAULT", "WHAT IT DOES"];
                let found = keys(&answer.metadata, pattern.as_deref().unwrap_or_default());
                if let (true, Some(pattern)) = (found.is_empty(), &pattern) {
                    return Err(Error::Local(format!(
                        "no key contains {pattern:?} (karst config keys lists all)"
                    )));
                }
                let list = List::of(columns, Value::Array(found), |key| {
                    ["name", "entity", "condition", "liveupdate", "defaultdesc", "shortdesc"]
                        .map(|field| member(key, field))
                        .to_vec()
                });
                list.print(format.format)
            }
            Self::Device(command) => command.run(context, Owner::Instance).await,
            Self::Metadata(command) => command.run(context).await,
            Self::Template(command) => command.run(context).await,
        }
    }
}
