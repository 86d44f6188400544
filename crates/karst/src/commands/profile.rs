//! `profile`, also which profiles an instance has.

use serde_json::{Value, json};

use super::{
    common::Common,
    completion::complete,
    device::{Device, Owner},
    object::{Object, config_object, create},
};
use crate::{
    client::{Kind, Url},
    context::Context,
    editor,
    error::{Error, Result},
    output::{
        from_yaml, member,
        table::{FormatOption, List},
    },
};

/// `profile ...`
#[derive(Debug, clap::Subcommand)]
pub enum Profile {
    /// List profiles
    #[command(visible_alias = "ls")]
    List {
        #[command(flatten)]
        format: FormatOption,
    },
    /// Create a profile
    Create {
        /// Its name
        name: String,
        /// Its keys
        #[arg(value_name = "KEY=VALUE")]
        keys: Vec<String>,
        /// Description
        #[arg(long)]
        description: Option<String>,
        /// Config, devices and description as YAML on stdin
        #[arg(long)]
        stdin: bool,
    },
    /// Devices of profiles
    #[command(subcommand)]
    Device(Device),
    /// Give an instance one more profile
    Add {
        /// Instance
        #[arg(add = complete(Kind::Instance))]
        instance: String,
        /// Profile
        #[arg(add = complete(Kind::Profile))]
        profile: String,
    },
    /// Take a profile from an instance
    Remove {
        /// Instance
        #[arg(add = complete(Kind::Instance))]
        instance: String,
        /// Profile
        #[arg(add = complete(Kind::Profile))]
        profile: String,
    },
    /// Give an instance exactly these profiles
    Assign {
        /// Instance
        #[arg(add = complete(Kind::Instance))]
        instance: String,
        /// Profiles, separated by commas; "" for none
        profiles: String,
    },
    #[command(flatten)]
    Common(Common),
}

/// A profile as an object with fields.
pub fn profile(name: &str) -> Object {
    Object {
        url: Url::new(&["profiles", name]),
        kind: Kind::Profile,
        name: name.to_owned(),
        fields: &["config", "description", "devices"],
    }
}

impl Profile {
    /// Runs it.
    pub async fn run(self, context: &Context) -> Result<()> {
        match self {
            Self::List { format } => {
                let objects =
                    context.client.get(&Url::new(&["profiles"]).with("recursion", 1)).await?.metadata;
                let list = List::of(&["NAME", "DESCRIPTION", "USED BY"], objects, |profile| {
                    let used = profile["used_by"].as_array().map_or(0, Vec::len).to_string();
                    vec![member(profile, "name"), member(profile, "description"), used]
                });
                list.print(format.format)
            }
            Self::Create { name, keys, description, stdin } => {
                let mut body = if stdin { from_yaml(&editor::from_stdin()?)? } else { json!({}) };
                if body.is_null() {
                    body = json!({});
                }
                if !body.is_object() {
                    return Err(Error::local("no YAML mapping on stdin"));
                }
                body["name"] = json!(name);
                if !keys.is_empty() {
                    body["config"] = config_object(&keys)?;
                }
                if let Some(description) = description {
                    body["description"] = json!(description);
                }
                create(context, &Url::new(&["profiles"]), body, format!("creating profile {name}")).await
            }
            Self::Device(command) => command.run(context, Owner::Profile).await,
            Self::Add { instance, profile } => {
                change(context, &instance, |mut names| {
                    if names.contains(&profile) {
                        return Err(Error::Local(format!(
                            "instance \"{instance}\" has profile \"{profile}\" already"
                        )));
                    }
                    names.push(profile.clone());
                    Ok(names)
                })
                .await
            }
            Self::Remove { instance, profile } => {
                change(context, &instance, |mut names| {
                    let before = names.len();
                    names.retain(|name| *name != profile);
                    if names.len() == before {
                        return Err(Error::Local(format!(
                            "instance \"{instance}\" has no profile \"{profile}\""
                        )));
                    }
                    Ok(names)
                })
                .await
            }
            Self::Assign { instance, profiles } => {
                let wanted = profiles.split(',').map(str::trim).filter(|name| !name.is_empty());
                let wanted: Vec<String> = wanted.map(str::to_owned).collect();
                change(context, &instance, |_| Ok(wanted.clone())).await
            }
            Self::Common(command) => command.run(context, profile).await,
        }
    }
}

/// Changes the profiles of an instance, if it is still as it was read.
async fn change(
    context: &Context,
    instance: &str,
    with: impl Fn(Vec<String>) -> Result<Vec<String>>,
) -> Result<()> {
    let object = super::config::instance(instance);
    let answer = object.get(context).await?;
    let names = answer.metadata["profiles"].as_array().into_iter().flatten().filter_map(Value::as_str);
    let names = with(names.map(str::to_owned).collect())?;
    let mut body = object.writable(&answer.metadata);
    body.insert("profiles".to_owned(), json!(names));
    object.put(context, body, answer.etag.as_deref()).await
}
