//! Images that are pushed: to a server that awaits one, and from one that shows the secret that was made for it here.
//!
//! A secret stands for whoever made it, for one image of one project, once. What the image is called and who may see it is said
//! where the secret is made; who brings the image says nothing of that.

use super::{CALL, FEATURE, ImageFile, ImageOptions, check_options, demand_new, remote::RemoteSource};
use crate::{
    Engine,
    context::Context,
    operations::{LiveOperation, NewOperation},
};
use karst_agent::CallContext;
use karst_env::EnvExt;
use karst_model::{
    Error, OperationId, ProjectId, Result,
    access::Permission,
    image::{ImageServerProtocol, UpdateSource},
    operation::{Operation, OperationClass},
};
use serde_json::Map;
use std::{
    collections::BTreeMap,
    os::fd::OwnedFd,
    sync::{Arc, Mutex},
    time::Duration,
};

/// How long an image is awaited, and how long who brought it may ask what became of it.
const GOOD: Duration = Duration::from_secs(900);
/// Most secrets of each kind at once.
const MOST: usize = 1024;
/// Most images that one project awaits at once, so that none keeps the others from it.
const MOST_OF_PROJECT: usize = 64;
/// How long a push may take in all; that it does not stand still, the client sees to.
const PUSH: Duration = Duration::from_secs(6 * 3600);

/// An image that is awaited.
struct Awaited {
    context: Context,
    project: String,
    /// The project that gets it.
    home: ProjectId,
    options: ImageOptions,
    until: Duration,
}

/// One that came, and who may ask for it.
struct Came {
    secret: String,
    context: Context,
    until: Duration,
}

/// Secrets that were made, by themselves, and operations of what came. They do not outlive the process.
#[derive(Default)]
pub(crate) struct Pushes(Mutex<(BTreeMap<String, Awaited>, BTreeMap<OperationId, Came>)>);

/// An image whose secret was shown.
#[derive(Debug)]
pub struct Admitted {
    /// Who made the secret, as far as he still is who he was.
    pub context: Context,
    /// What he said of the image.
    pub options: ImageOptions,
}

/// Where an image is to be pushed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PushImage {
    /// Address of the server.
    pub server: String,
    /// Its certificate (PEM), where no authority vouches for it.
    pub certificate: Option<String>,
    /// The secret that was made there.
    pub secret: String,
    /// Project there.
    pub project: Option<String>,
    /// Profiles of instances made of it there; `None`: as there.
    pub profiles: Option<Vec<String>>,
}

/// An image on its way to a server.
#[derive(Debug)]
pub struct PushedImage {
    /// Its fingerprint.
    pub fingerprint: String,
    /// Name of its file.
    pub filename: String,
    /// Profiles to be said of it.
    pub profiles: Option<Vec<String>>,
    /// Its files, in the order of the fingerprint, each with a descriptor that reads it.
    pub files: Vec<(ImageFile, OwnedFd)>,
}

impl Engine {
    fn new_secret(&self) -> String {
        let mut secret = [0u8; 32];
        self.inner().env.fill_random(&mut secret);
        secret.iter().map(|b| format!("{b:02x}")).collect()
    }

    /// Makes a secret by which somebody who is nobody here can bring one image, for a quarter of an hour. It is answered to who
    /// asked, and stands in no record: operations and events are shown to all who see the project.
    ///
    /// # Errors
    /// Invalid by field, conflict when the image is here, forbidden, quota.
    pub fn image_await(
        &self,
        context: &Context,
        project: &str,
        fingerprint: &str,
        options: ImageOptions,
    ) -> Result<(LiveOperation, String)> {
        let home = self.project_of(context, project, FEATURE, Permission::ResourceEdit)?;
        let fingerprint = fingerprint.to_ascii_lowercase();
        let options = ImageOptions { fingerprint: Some(fingerprint.clone()), ..options };
        check_options(&options)?;
        let inner = self.inner();
        demand_new(&inner.inventory.read(), home.id, &fingerprint)?;
        let now = inner.env.monotonic();
        let secret = self.new_secret();
        {
            let mut table = inner.image_pushes.0.lock().unwrap_or_else(|e| e.into_inner());
            table.0.retain(|_, a| a.until > now);
            if table.0.len() >= MOST {
                return Err(Error::quota("too many images are awaited; try again in a while"));
            }
            if table.0.values().filter(|a| a.home == home.id).count() >= MOST_OF_PROJECT {
                return Err(Error::quota(
                    "too many images are awaited in this project; try again in a while",
                ));
            }
            let awaited = Awaited {
                context: context.clone(),
                project: project.to_owned(),
                home: home.id,
                options,
                until: now + GOOD,
            };
            table.0.insert(secret.clone(), awaited);
        }
        let path = super::path(&fingerprint);
        let mut new = NewOperation::task("Image upload token", Some(home.id), "images", path);
        new.class = OperationClass::Token;
        let live = inner.operations.begin(context, new);
        inner.operations.end(&live, Ok(Map::from_iter([("fingerprint".to_owned(), fingerprint.into())])));
        Ok((live, secret))
    }

    /// Takes a secret: it is used up. Whoever brings the image acts for the one who made it.
    ///
    /// # Errors
    /// Unauthenticated.
    pub fn image_admit(&self, project: &str, fingerprint: &str, secret: &str) -> Result<Admitted> {
        let inner = self.inner();
        let now = inner.env.monotonic();
        let mut table = inner.image_pushes.0.lock().unwrap_or_else(|e| e.into_inner());
        table.0.retain(|_, a| a.until > now);
        let fits = table.0.get(secret).is_some_and(|a| {
            let wanted = a.options.fingerprint.as_deref().unwrap_or_default();
            a.project == project && wanted.eq_ignore_ascii_case(fingerprint)
        });
        let awaited = if fits { table.0.remove(secret) } else { None };
        drop(table);
        let awaited = awaited.ok_or_else(|| {
            Error::unauthenticated(
                "the secret was not made here for this image, or it was used, or its time is over",
            )
        })?;
        // What was taken away from him since counts.
        let context = Context::new(self.principal_now(awaited.context.principal()));
        Ok(Admitted { context, options: awaited.options })
    }

    /// Makes a secret by which who brought an image can wait for what becomes of it.
    pub fn image_came(&self, admitted: Context, operation: OperationId) -> String {
        let inner = self.inner();
        let now = inner.env.monotonic();
        let secret = self.new_secret();
        let mut table = inner.image_pushes.0.lock().unwrap_or_else(|e| e.into_inner());
        table.1.retain(|_, c| c.until > now);
        // Who has no place asks in vain; what he brought is taken in all the same.
        if table.1.len() < MOST {
            let came = Came { secret: secret.clone(), context: admitted, until: now + GOOD };
            table.1.insert(operation, came);
        }
        secret
    }

    /// Waits for the end of what was brought, at most `timeout`, for one who shows the secret.
    ///
    /// # Errors
    /// Unauthenticated, not found.
    pub async fn image_came_wait(
        &self,
        operation: OperationId,
        secret: &str,
        timeout: Option<Duration>,
    ) -> Result<Arc<Operation>> {
        let inner = self.inner();
        let now = inner.env.monotonic();
        let context = {
            let table = inner.image_pushes.0.lock().unwrap_or_else(|e| e.into_inner());
            let came = table.1.get(&operation).filter(|c| c.until > now && c.secret == secret);
            came.map(|c| c.context.clone())
        };
        let context = context.ok_or_else(|| Error::unauthenticated("authentication is required"))?;
        self.operation_wait(&context, operation, timeout).await
    }

    /// Pushes an image to a server where a secret was made for it.
    ///
    /// # Errors
    /// Invalid by field, not found, forbidden; what fails with the server comes with the operation.
    pub async fn image_push(
        &self,
        context: &Context,
        project: &str,
        reference: &str,
        request: PushImage,
    ) -> Result<LiveOperation> {
        let home = self.project_of(context, project, FEATURE, Permission::ResourceEdit)?;
        let inner = self.inner();
        let image = inner.inventory.read().image(home.id, reference)?.clone();
        let target = RemoteSource {
            from: UpdateSource {
                server: request.server,
                protocol: ImageServerProtocol::Incus,
                certificate: request.certificate.filter(|c| !c.is_empty()),
                alias: None,
                kind: Some(image.kind),
            },
            reference: image.fingerprint.clone(),
            secret: Some(request.secret),
            project: request.project.filter(|p| !p.is_empty()),
            login: None,
        };
        let checked = target.check().and_then(|()| self.demand_image_server(context, project, &target));
        checked.map_err(|e| match e.field.as_deref() {
            Some("source.server") => e.at("target"),
            Some("source.certificate") => e.at("certificate"),
            _ => e,
        })?;
        if target.secret.as_ref().is_none_or(String::is_empty) {
            return Err(Error::invalid(
                "secret",
                "the secret is missing: the server that gets the image makes one",
            ));
        }
        let servers = self.image_servers()?;
        let path = super::path(&image.fingerprint);
        let mut new = NewOperation::task("Pushing image", Some(home.id), "images", path);
        new.may_cancel = true;
        let live = inner.operations.begin(context, new);
        let (engine, outer, profiles) = (self.clone(), live.clone(), request.profiles);
        inner.env.spawn_task("image-push", async move {
            let inner = engine.inner();
            let work = async {
                let agent = inner.agents.get(inner.node)?;
                let answer = agent.image_export(&CallContext::read(CALL), image.id).await?;
                let pushed = PushedImage {
                    fingerprint: image.fingerprint.clone(),
                    filename: image.filename.clone(),
                    profiles,
                    files: answer.value.into_iter().zip(answer.fds).collect(),
                };
                let told = |sent: u64| {
                    let percent = sent.saturating_mul(100).checked_div(image.size).unwrap_or(0).min(100);
                    inner.operations.progress(&outer, |m| {
                        m.insert("upload_progress".into(), format!("{percent}%").into());
                    });
                };
                match inner.env.timeout(PUSH, servers.push(&target, pushed, &told)).await {
                    Ok(done) => done,
                    Err(_) => Err(Error::timeout("the push took too long")),
                }
            };
            let done = engine.unless_cancelled(&outer, work).await;
            inner.operations.end(&outer, done.map(|()| Map::new()));
        });
        Ok(live)
    }
}
