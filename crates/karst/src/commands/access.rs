//! `access`, `token` and `audit`: who may do what, by which token, and who did what.

use hyper::Method;
use serde_json::{Value, json};

use crate::{
    client::Url,
    context::Context,
    error::{Error, Result},
    output::{
        self, member,
        table::{FormatOption, List},
        units,
    },
};

/// `access ...`
#[derive(Debug, clap::Subcommand)]
pub enum Access {
    /// List who has which role
    #[command(visible_alias = "ls")]
    List {
        #[command(flatten)]
        format: FormatOption,
    },
    /// Give a role to a certificate or token
    Grant(Role),
    /// Take a given role away again
    Revoke(Role),
    /// Say whether somebody may do something, and why
    Why {
        /// A certificate's fingerprint or name, a token's name, "unix" or "me"
        principal: String,
        /// Such as project_view, instance_use, resource_edit, server_edit
        permission: String,
        /// "server", project/NAME, or a path such as /1.0/instances/c1?project=p
        object: String,
    },
}

/// A role of somebody.
#[derive(Debug, clap::Args)]
pub struct Role {
    /// A certificate's fingerprint or name, or a token's name
    principal: String,
    /// admin, operator, user, viewer or metrics
    role: String,
    /// In this project only
    #[arg(long = "in", value_name = "PROJECT")]
    project: Option<String>,
}

impl Access {
    /// Runs it.
    pub async fn run(self, context: &Context) -> Result<()> {
        let client = &context.client;
        let url = Url::new(&["karst", "access"]);
        let body = |r: &Role| json!({"principal": r.principal, "role": r.role, "project": r.project});
        match self {
            Self::List { format } => {
                let all: Value = client.get(&url).await?.metadata;
                List::of(&["WHO", "PROVIDER", "ROLE", "PROJECT"], all, |entry| {
                    let project = member(entry, "project");
                    vec![
                        member(entry, "identifier"),
                        member(entry, "provider"),
                        member(entry, "role"),
                        if project.is_empty() { "(everywhere)".into() } else { project },
                    ]
                })
                .print(format.format)
            }
            Self::Grant(role) => client.post(&url, &body(&role)).await.map(drop),
            Self::Revoke(role) => client.change(Method::DELETE, &url, &body(&role), None).await.map(drop),
            Self::Why { principal, permission, object } => {
                let url = url.join("why").with("principal", principal);
                let url = url.with("permission", permission).with("object", object);
                let why = client.get(&url).await?.metadata;
                let allowed = why["allowed"] == true;
                let mut text = format!(
                    "{}: {} {} {} with {}\n",
                    if allowed { "yes" } else { "no" },
                    member(&why, "principal"),
                    if allowed { "may" } else { "may not" },
                    member(&why, "permission"),
                    member(&why, "object")
                );
                for line in why["because"].as_array().into_iter().flatten() {
                    text.push_str(&format!("  {}\n", line.as_str().unwrap_or_default()));
                }
                output::print(&text)
            }
        }
    }
}

/// `token ...`
#[derive(Debug, clap::Subcommand)]
pub enum Token {
    /// List API tokens
    #[command(visible_alias = "ls")]
    List {
        #[command(flatten)]
        format: FormatOption,
    },
    /// Create an API token and print it; it cannot be shown again
    Create {
        /// Its name
        name: String,
        /// admin, operator, user, viewer or metrics
        #[arg(long)]
        role: String,
        /// In these projects only
        #[arg(long = "in", value_name = "PROJECT")]
        projects: Vec<String>,
        /// Until when it is valid (RFC 3339, such as 2027-01-31T00:00:00Z)
        #[arg(long, value_name = "TIME")]
        expires: Option<String>,
        /// Description
        #[arg(long, default_value = "")]
        description: String,
    },
    /// Delete API tokens
    #[command(visible_alias = "rm")]
    Delete {
        /// Their names
        #[arg(required = true)]
        names: Vec<String>,
    },
}

impl Token {
    /// Runs it.
    pub async fn run(self, context: &Context) -> Result<()> {
        let client = &context.client;
        let url = Url::new(&["karst", "tokens"]);
        match self {
            Self::List { format } => {
                let all = client.get(&url).await?.metadata;
                List::of(&["NAME", "ROLES", "CREATED", "EXPIRES", "DESCRIPTION"], all, |token| {
                    let grants = token["grants"].as_array().cloned().unwrap_or_default();
                    let grants: Vec<_> = grants
                        .iter()
                        .map(|g| match member(g, "project").as_str() {
                            "" => member(g, "role"),
                            project => format!("{} in {project}", member(g, "role")),
                        })
                        .collect();
                    vec![
                        member(token, "name"),
                        grants.join(", "),
                        units::time(&member(token, "created_at")),
                        units::time(&member(token, "expires_at")),
                        member(token, "description"),
                    ]
                })
                .print(format.format)
            }
            Self::Create { name, role, projects, expires, description } => {
                let body = json!({
                    "name": name, "role": role, "projects": projects, "expires_at": expires, "description": description,
                });
                let made = client.post(&url, &body).await?.metadata;
                output::print(&format!("{}\n", member(&made, "token")))
            }
            Self::Delete { names } => {
                crate::client::operation::for_each(&names, |name| {
                    let url = Url::new(&["karst", "tokens", &name]);
                    async move { client.delete(&url).await.map(drop) }
                })
                .await
            }
        }
    }
}

/// `audit ...`
#[derive(Debug, clap::Subcommand)]
pub enum Audit {
    /// List what was done and refused
    #[command(visible_alias = "ls")]
    List {
        #[command(flatten)]
        format: FormatOption,
        /// From this record on
        #[arg(long, default_value_t = 1)]
        from: u64,
        /// At most so many records
        #[arg(long, default_value_t = 500)]
        limit: u32,
    },
    /// Check that no record was changed, left out or put in
    Verify {
        /// Also check that the log still has this record: NUMBER:HASH as an earlier verify printed it
        #[arg(long, value_name = "NUMBER:HASH")]
        head: Option<String>,
    },
}

impl Audit {
    /// Runs it.
    pub async fn run(self, context: &Context) -> Result<()> {
        let client = &context.client;
        let url = Url::new(&["karst", "audit"]);
        match self {
            Self::List { format, from, limit } => {
                let all = client.get(&url.with("from", from).with("limit", limit)).await?.metadata;
                let columns = &["NUMBER", "TIME", "WHO", "WHAT", "OBJECT", "PROJECT", "OUTCOME", "DETAIL"];
                List::of(columns, all, |record| {
                    let entry = &record["entry"];
                    vec![
                        member(record, "seq"),
                        units::time(&member(entry, "time")),
                        member(entry, "who"),
                        member(entry, "what"),
                        member(entry, "object"),
                        member(entry, "project"),
                        member(entry, "outcome"),
                        crate::error::one_line(&member(entry, "detail")),
                    ]
                })
                .print(format.format)
            }
            Self::Verify { head } => {
                let verdicts = client.get(&url.clone().join("verify")).await?.metadata;
                let mut faults = vec![];
                for verdict in verdicts.as_array().into_iter().flatten() {
                    let node = member(verdict, "node");
                    if !verdict["fault"].is_null() {
                        faults.push(format!("{node}: {}", member(verdict, "fault")));
                        continue;
                    }
                    output::print(&format!(
                        "{node}: {} records from {} on are whole; head {}:{}\n",
                        member(verdict, "checked"),
                        member(verdict, "first"),
                        member(&verdict["head"], "seq"),
                        member(&verdict["head"], "hash")
                    ))?;
                }
                if let Some(known) = head {
                    let wrong = || Error::Usage(format!("\"{known}\" is not NUMBER:HASH"));
                    let (number, hash) = known.split_once(':').ok_or_else(wrong)?;
                    let number: u64 = number.parse().map_err(|_| wrong())?;
                    let page = client.get(&url.with("from", number).with("limit", 1)).await?.metadata;
                    let found = &page[0];
                    if found["seq"] != number || found["hash"] != hash {
                        faults.push(format!("record {number} with this hash is not there (any more)"));
                    }
                }
                match faults.is_empty() {
                    true => Ok(()),
                    false => Err(Error::local(faults.join("; "))),
                }
            }
        }
    }
}
