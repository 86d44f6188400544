//! Images that come from servers: other Incus, LXD and Karst servers, simplestreams, and registries of the OCI.
//!
//! Fetching is control's work, never the host's. The front end speaks the servers' protocols behind [`ImageServers`] and
//! writes what comes into staged parts, which the host bounds; that the files are what was asked for, the host's own hash
//! over them decides. A download that does not end well leaves nothing: what was staged goes with its handle.

use super::{FEATURE, ImageOptions, check_options, name_it, push::PushedImage, told};
use crate::{
    Engine, EngineInner, Row,
    compute::create::{CreateInstance, InstanceSource},
    context::Context,
    operations::{LiveOperation, NewOperation},
    secrets::SecretValue,
    tenancy::{restricted, rules::ProjectRules, server::ServerSettings},
    uploads::{ImageUpload, PartUpload},
};
use async_trait::async_trait;
use karst_agent::ImagePart;
use karst_env::EnvExt;
use karst_model::{
    Config, Error, ErrorKind, ImageId, Name, ProjectId, Result,
    access::Permission,
    image::{Image, ImageOrigin, ImageServerProtocol, UpdateSource},
    instance::InstanceKind,
    project::Project,
    registry::{check_password, check_user},
};
use serde_json::{Map, Value};
use std::{collections::BTreeMap, sync::Arc, time::Duration};

/// How long finding an image on a server may take.
const FIND: Duration = Duration::from_secs(120);
/// How long a download may take in all; that it does not stand still, the client sees to.
const FETCH: Duration = Duration::from_secs(6 * 3600);
/// Longest address of a server and longest certificate.
const LONGEST: (usize, usize) = (2048, 64 << 10);

/// An image on a server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RemoteSource {
    /// Where and how; of its alias nothing is asked.
    pub from: UpdateSource,
    /// Alias, fingerprint, or the beginning of one.
    pub reference: String,
    /// Lets one who is nobody there read an image that is not public.
    pub secret: Option<String>,
    /// Project there.
    pub project: Option<String>,
    /// Who one is there, at a registry that wants to know.
    pub login: Option<Login>,
}

/// A name at a registry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Login {
    /// The name.
    pub user: String,
    /// The password.
    pub password: SecretValue,
}

impl RemoteSource {
    /// Checks what a user says of a server.
    ///
    /// # Errors
    /// Invalid by field below `source`.
    pub fn check(&self) -> Result<()> {
        let server = &self.from.server;
        let rest = server.strip_prefix("https://").unwrap_or_default();
        let host = rest.split('/').next().unwrap_or_default();
        let odd = |c: char| c.is_whitespace() || c.is_control() || matches!(c, '@' | '?' | '#' | '\\');
        if host.is_empty() || server.len() > LONGEST.0 || server.contains(odd) {
            // What stands before an @ may be a password.
            let said = if server.contains('@') { "this".to_owned() } else { format!("{server:?}") };
            let text = format!(
                "{said} is not the address of an image server; write it as https://HOST[:PORT][/PATH]"
            );
            return Err(Error::invalid("source.server", text));
        }
        if let Some(login) = &self.login {
            if self.from.protocol != ImageServerProtocol::Oci {
                let text = "a name and a password are for registries, with the protocol oci";
                return Err(Error::invalid("source.server", text));
            }
            check_user("source.server", &login.user)?;
            check_password("source.server", login.password.bytes())?;
        }
        if self.from.certificate.as_ref().is_some_and(|c| c.len() > LONGEST.1) {
            return Err(Error::invalid("source.certificate", "the certificate is too long"));
        }
        let name = &self.reference;
        if name.is_empty() {
            let text = "the image is missing: give source.alias or source.fingerprint";
            return Err(Error::invalid("source.alias", text));
        }
        if name.len() > 255 || name.chars().any(char::is_control) {
            return Err(Error::invalid(
                "source.alias",
                format!("{name:?} is neither an image alias nor a fingerprint"),
            ));
        }
        Ok(())
    }
}

/// What a server has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RemoteImage {
    /// SHA-256 over its files, as it says.
    pub fingerprint: String,
    /// For which kind of instance.
    pub kind: InstanceKind,
    /// Bytes of its files, as it says.
    pub size: u64,
    /// Name of the file.
    pub filename: String,
    /// `os`, `release`, …
    pub properties: Config,
    /// Until when it is vouched for, as it says.
    pub expires_at: Option<jiff::Timestamp>,
    /// It was found by an alias, which may name a newer one some day.
    pub by_alias: bool,
    /// Files of a simplestreams server: what, where below the server, SHA-256, size.
    pub files: Vec<(ImagePart, String, String, u64)>,
}

/// Where the parts of a download go.
#[async_trait]
pub trait Parts: Send + Sync {
    /// Opens the file of a part.
    ///
    /// # Errors
    /// Quota, naming the host's limit.
    async fn open(&self, part: ImagePart) -> Result<PartUpload>;
    /// So many bytes of all have come.
    fn progress(&self, come: u64);
}

/// A client of image servers. Only `https` is spoken; every wait is bounded.
#[async_trait]
pub trait ImageServers: Send + Sync {
    /// What a server has under a name.
    ///
    /// # Errors
    /// Not found; unavailable, saying why; invalid when the server's answer makes no sense.
    async fn find(&self, source: &RemoteSource) -> Result<RemoteImage>;
    /// Fetches its files; answers the parts in the order of the fingerprint. No more than the image's size comes.
    ///
    /// # Errors
    /// As `find`; quota.
    async fn fetch(
        &self,
        source: &RemoteSource,
        image: &RemoteImage,
        to: &dyn Parts,
    ) -> Result<Vec<ImagePart>>;
    /// Brings an image to a server that awaits it, by the secret of `target`, and waits until it is there; tells how many bytes have gone.
    ///
    /// # Errors
    /// Unavailable, saying why; what the server says against it.
    async fn push(
        &self,
        target: &RemoteSource,
        image: PushedImage,
        told: &(dyn Fn(u64) + Send + Sync),
    ) -> Result<()>;
}

/// What a user wants fetched.
#[derive(Debug, Clone)]
pub struct FetchImage {
    /// From where.
    pub source: RemoteSource,
    /// What is said of it here; its own properties stay.
    pub options: ImageOptions,
    /// Follow the server.
    pub auto_update: bool,
}

struct Staging<'a> {
    engine: &'a Engine,
    context: &'a Context,
    project: &'a str,
    upload: &'a ImageUpload,
    live: &'a LiveOperation,
    size: u64,
}

#[async_trait]
impl Parts for Staging<'_> {
    async fn open(&self, part: ImagePart) -> Result<PartUpload> {
        self.engine.image_upload_part(self.context, self.project, self.upload, part).await
    }
    fn progress(&self, come: u64) {
        let percent = come.saturating_mul(100).checked_div(self.size).unwrap_or(0).min(100);
        self.engine.inner().operations.progress(self.live, |m| {
            m.insert("download_progress".into(), format!("rootfs: {percent}%").into());
        });
    }
}

async fn ended(operation: LiveOperation) -> Result<Map<String, Value>> {
    let record = operation.ended().await;
    match &record.error {
        Some(e) => Err(e.clone()),
        None => Ok(record.metadata.clone()),
    }
}

impl Engine {
    /// Says who speaks to image servers; without, nothing is fetched.
    pub fn set_image_servers(&self, servers: Arc<dyn ImageServers>) {
        *self.inner().image_servers.write().unwrap_or_else(|e| e.into_inner()) = Some(servers);
    }

    pub(super) fn demand_image_server(
        &self,
        context: &Context,
        project: &str,
        source: &RemoteSource,
    ) -> Result<()> {
        let project = self.project(context, project, Permission::ProjectView)?;
        restricted::check_image_server(&ProjectRules::parse(&project.config)?, &source.from.server)
    }

    pub(super) fn image_servers(&self) -> Result<Arc<dyn ImageServers>> {
        let servers = self.inner().image_servers.read().unwrap_or_else(|e| e.into_inner()).clone();
        servers.ok_or_else(|| Error::unsupported("this server fetches no images"))
    }

    /// Copies an image from a server. One that is here already only gets the aliases.
    ///
    /// # Errors
    /// Invalid by field, not found, forbidden; what fails with the server comes with the operation.
    pub async fn image_fetch(
        &self,
        context: &Context,
        project: &str,
        request: FetchImage,
    ) -> Result<LiveOperation> {
        let row = self.project_of(context, project, FEATURE, Permission::ResourceEdit)?;
        request.source.check()?;
        self.demand_image_server(context, project, &request.source)?;
        check_options(&request.options)?;
        self.image_servers()?;
        let path = super::path(&request.source.reference);
        let mut new = NewOperation::task("Downloading image", Some(row.id), "images", path);
        new.may_cancel = true;
        let live = self.inner().operations.begin(context, new);
        let (engine, context, outer, project) =
            (self.clone(), context.clone(), live.clone(), project.to_owned());
        self.inner().env.spawn_task("image-fetch", async move {
            let work = engine.fetch_image(&context, &project, &request, &outer, false);
            let done = engine.unless_cancelled(&outer, work).await;
            let done = done.map(|image| told(&image.fingerprint, image.size));
            engine.inner().operations.end(&outer, done);
        });
        Ok(live)
    }

    /// Creates an instance of an image that a server has: fetched first, and kept for the next one, where it is not here.
    ///
    /// # Errors
    /// Invalid by field, not found, forbidden; what fails later comes with the operation.
    pub async fn instance_create_remote(
        &self,
        context: &Context,
        project: &str,
        mut request: CreateInstance,
        source: RemoteSource,
    ) -> Result<LiveOperation> {
        let row = self.project(context, project, Permission::ResourceEdit)?;
        source.check()?;
        self.demand_image_server(context, project, &source)?;
        self.image_servers()?;
        let name = match request.name.as_deref().filter(|n| !n.is_empty()) {
            Some(name) => Name::parse("name", name)?,
            None => {
                let records = self.inner().inventory.read();
                crate::compute::create::make_up_name(self.inner(), &records, row.id)
            }
        };
        self.inner().demand_free_name(&self.inner().inventory.read(), row.id, &name)?;
        request.name = Some(name.to_string());
        let path = crate::compute::path(project, &name);
        let mut new = NewOperation::task("Creating instance", Some(row.id), "instances", path);
        new.may_cancel = true;
        let live = self.inner().operations.begin(context, new);
        let auto_update = self.settings_in(&row).auto_update_cached;
        let fetch = FetchImage { source, options: ImageOptions::default(), auto_update };
        let (engine, context, outer, project) =
            (self.clone(), context.clone(), live.clone(), project.to_owned());
        self.inner().env.spawn_task("image-fetch", async move {
            let work = async {
                let image = engine.fetch_image(&context, &project, &fetch, &outer, true).await?;
                request.source = InstanceSource::Image(image.fingerprint.clone());
                let (_, operation) = engine.instance_create(&context, &project, request).await?;
                ended(operation).await
            };
            let done = engine.unless_cancelled(&outer, work).await;
            engine.inner().operations.end(&outer, done);
        });
        Ok(live)
    }

    pub(super) async fn unless_cancelled<T>(
        &self,
        live: &LiveOperation,
        work: impl Future<Output = Result<T>>,
    ) -> Result<T> {
        tokio::select! {
            biased;
            () = live.cancelled() => Err(Error::cancelled("cancelled")),
            done = work => done,
        }
    }

    fn local(&self, project: ProjectId, fingerprint: &str) -> Option<Row<Image>> {
        let records = self.inner().inventory.read();
        let found = records.images.values().find(|i| i.project == project && i.fingerprint == fingerprint);
        found.cloned()
    }

    /// The image, fetched where it is not here.
    async fn fetch_image(
        &self,
        context: &Context,
        project: &str,
        request: &FetchImage,
        live: &LiveOperation,
        cached: bool,
    ) -> Result<Row<Image>> {
        let home = self.project_of(context, project, FEATURE, Permission::ResourceEdit)?;
        let inner = self.inner();
        // Also when it is fetched again, of a server that the project might use once.
        self.demand_image_server(context, project, &request.source)?;
        let servers = self.image_servers()?;
        let own = self.project(context, project, Permission::ResourceEdit)?;
        let source = self.with_login(own.id, request.source.clone())?;
        let found = match inner.env.timeout(FIND, servers.find(&source)).await {
            Ok(found) => found?,
            Err(_) => return Err(Error::timeout("the image server does not answer")),
        };
        if let Some(kind) = source.from.kind
            && kind != found.kind
        {
            let text = format!("the server's image is for a {}, not for a {kind}", found.kind);
            return Err(Error::invalid("source.alias", text));
        }
        // Two that want the same one at once: the second finds what the first fetched.
        let turn = inner.fetching.of(format!("{} {}", home.id, found.fingerprint));
        let _turn = turn.lock().await;
        if let Some(image) = self.local(home.id, &found.fingerprint) {
            self.keep_image(&image, &request.options, cached).await?;
            return Ok(image);
        }
        let upload = self.image_upload(context, project)?;
        let staging = Staging { engine: self, context, project, upload: &upload, live, size: found.size };
        let parts = match inner.env.timeout(FETCH, servers.fetch(&source, &found, &staging)).await {
            Ok(parts) => parts?,
            Err(_) => return Err(Error::timeout("the download took too long")),
        };
        let mut options = request.options.clone();
        options.fingerprint = Some(found.fingerprint.clone());
        let mut properties = found.properties.clone();
        properties.extend(std::mem::take(&mut options.properties));
        options.properties = properties;
        if options.filename.is_empty() {
            options.filename = found.filename.clone();
        }
        options.expires_at = options.expires_at.or(found.expires_at);
        options.origin = Some(ImageOrigin {
            from: UpdateSource {
                kind: Some(found.kind),
                alias: found.by_alias.then(|| source.reference.clone()),
                ..source.from.clone()
            },
            cached,
            auto_update: request.auto_update && found.by_alias,
            looked_at: None,
        });
        let import = self.image_import(context, project, upload, parts, options).await?;
        ended(import).await?;
        let gone = || Error::conflict("the image was deleted while it was fetched");
        self.local(home.id, &found.fingerprint).ok_or_else(gone)
    }

    /// An image that is here already is wanted under these names; one that was only cached stays then.
    async fn keep_image(&self, image: &Row<Image>, options: &ImageOptions, cached: bool) -> Result<()> {
        let cached_only = |i: &Image| i.origin.as_ref().is_some_and(|o| o.cached);
        if options.aliases.is_empty() && (cached || !cached_only(image)) {
            return Ok(());
        }
        let id = image.id;
        self.inner()
            .transact(|records, tx| {
                let row = records.images.get(&id).ok_or_else(|| Error::not_found("the image is gone"))?;
                tx.expect(row);
                tx.expect_unlocked(&super::lock(id));
                if !cached && let Some(origin) = row.origin.as_ref().filter(|o| o.cached) {
                    let origin = Some(ImageOrigin { cached: false, ..origin.clone() });
                    tx.replace(
                        row,
                        &Image { origin, spec_version: row.spec_version + 1, ..row.value.clone() },
                    );
                }
                name_it(records, tx, (id, row.project, row.kind), options)
            })
            .await
    }

    /// Asks the server of an image for a newer one, which takes its place: its aliases name the newer one, and it goes.
    ///
    /// # Errors
    /// Not found, invalid when it came from no server, forbidden; what fails with the server comes with the operation.
    pub async fn image_refresh(
        &self,
        context: &Context,
        project: &str,
        reference: &str,
    ) -> Result<LiveOperation> {
        let row = self.project_of(context, project, FEATURE, Permission::ResourceEdit)?;
        let image = self.inner().inventory.read().image(row.id, reference)?.clone();
        let Some(origin) = image.origin.clone().filter(|o| o.from.alias.is_some()) else {
            let text = "the image came from no alias of a server that could have a newer one";
            return Err(Error::invalid("fingerprint", text));
        };
        self.image_servers()?;
        let path = super::path(&image.fingerprint);
        let mut new = NewOperation::task("Refreshing image", Some(row.id), "images", path);
        new.may_cancel = true;
        let live = self.inner().operations.begin(context, new);
        let (engine, context, outer, project) =
            (self.clone(), context.clone(), live.clone(), project.to_owned());
        self.inner().env.spawn_task("image-refresh", async move {
            let work = engine.refreshed(&context, &project, &image, origin, &outer);
            let done = engine.unless_cancelled(&outer, work).await;
            let told = |new: bool| Map::from_iter([("refreshed".to_owned(), Value::Bool(new))]);
            engine.inner().operations.end(&outer, done.map(told));
        });
        Ok(live)
    }

    async fn refreshed(
        &self,
        context: &Context,
        project: &str,
        image: &Row<Image>,
        origin: ImageOrigin,
        live: &LiveOperation,
    ) -> Result<bool> {
        let aliases: Vec<(String, String)> = {
            let records = self.inner().inventory.read();
            let of = records.aliases().filter(|a| a.image == image.id);
            of.map(|a| (a.name.clone(), a.description.clone())).collect()
        };
        let options = ImageOptions {
            aliases,
            move_aliases: true,
            public: image.public,
            profiles: Some(image.profiles.clone()),
            ..Default::default()
        };
        let reference = origin.from.alias.clone().unwrap_or_default();
        let source = RemoteSource { from: origin.from, reference, secret: None, project: None, login: None };
        let request = FetchImage { source, options, auto_update: origin.auto_update };
        let new = self.fetch_image(context, project, &request, live, origin.cached).await?;
        if new.id == image.id {
            return Ok(false);
        }
        let gone = self.image_delete(context, project, &image.fingerprint).await;
        match gone {
            Ok(operation) => ended(operation).await.map(drop)?,
            Err(e) if e.is(ErrorKind::NotFound) => {}
            Err(e) => return Err(e),
        }
        Ok(true)
    }
}

/// Locks by what is being fetched; one goes when nobody holds it.
#[derive(Default)]
pub(crate) struct Turns(std::sync::Mutex<BTreeMap<String, std::sync::Weak<tokio::sync::Mutex<()>>>>);

impl Turns {
    fn of(&self, what: String) -> Arc<tokio::sync::Mutex<()>> {
        let mut all = self.0.lock().unwrap_or_else(|e| e.into_inner());
        all.retain(|_, turn| turn.strong_count() > 0);
        if let Some(turn) = all.get(&what).and_then(std::sync::Weak::upgrade) {
            return turn;
        }
        let turn = Arc::default();
        all.insert(what, Arc::downgrade(&turn));
        turn
    }
}

/// Parses the name of a protocol.
///
/// # Errors
/// Invalid.
pub fn protocol(text: &str) -> Result<ImageServerProtocol> {
    match text {
        "simplestreams" => Ok(ImageServerProtocol::Simplestreams),
        "oci" => Ok(ImageServerProtocol::Oci),
        "incus" | "lxd" | "" => Ok(ImageServerProtocol::Incus),
        other => Err(Error::invalid(
            "source.protocol",
            format!("{other:?} is not a protocol of image servers; incus, lxd, simplestreams and oci are"),
        )),
    }
}

/// The settings that each project's images follow.
type OfProjects = BTreeMap<ProjectId, ServerSettings>;

impl Engine {
    fn image_settings(&self) -> OfProjects {
        let projects: Vec<Row<Project>> = self.inner().inventory.read().projects.values().cloned().collect();
        projects.iter().map(|project| (project.id, self.settings_in(project))).collect()
    }

    /// Notes that a newer image is looked for now. It stands in the record before anything is asked: a daemon that is restarted
    /// in between, or often, neither forgets the time nor asks at each start.
    async fn note_look(&self, image: &Due) -> Result<()> {
        let now = self.inner().env.now();
        self.inner()
            .transact(|records, tx| {
                let row =
                    records.images.get(&image.id).ok_or_else(|| Error::not_found("the image is gone"))?;
                let Some(origin) = &row.origin else { return Ok(()) };
                tx.expect_unlocked(&super::lock(image.id));
                let origin = Some(ImageOrigin { looked_at: Some(now), ..origin.clone() });
                tx.replace(row, &Image { origin, ..row.value.clone() });
                Ok(())
            })
            .await
    }
}

impl EngineInner {
    /// Images with those of `settings` that their project has, and where they came from.
    fn due_images(
        &self,
        settings: &OfProjects,
        is_due: impl Fn(&Image, &ImageOrigin, &ServerSettings) -> bool,
    ) -> Vec<Due> {
        let records = self.inventory.read();
        let due = |image: &Row<Image>| {
            let project = records.projects.get(&image.project)?;
            let (origin, settings) = (image.origin.as_ref()?, settings.get(&image.project)?);
            let due = || Due {
                id: image.id,
                project: project.name.to_string(),
                fingerprint: image.fingerprint.clone(),
            };
            is_due(image, origin, settings).then(due)
        };
        records.images.values().filter_map(due).collect()
    }

    /// The images to look for newer ones of.
    fn followed_images(&self, now: jiff::Timestamp, settings: &OfProjects) -> Vec<Due> {
        self.due_images(settings, |image, origin, settings| {
            let last = origin.looked_at.unwrap_or(image.uploaded_at);
            origin.auto_update && settings.auto_update_interval.is_some_and(|every| since(now, last) >= every)
        })
    }

    /// The images that were cached and that nobody used for long.
    fn unused_images(&self, now: jiff::Timestamp, settings: &OfProjects) -> Vec<Due> {
        self.due_images(settings, |image, origin, settings| {
            let last = image.last_used_at.unwrap_or(image.uploaded_at);
            origin.cached && settings.remote_cache_expiry.is_some_and(|kept| since(now, last) >= kept)
        })
    }
}

/// How long ago that was; nothing when the clock was put back.
fn since(now: jiff::Timestamp, then: jiff::Timestamp) -> Duration {
    Duration::try_from(now.duration_since(then)).unwrap_or_default()
}

/// An image whose time has come.
struct Due {
    id: ImageId,
    project: String,
    fingerprint: String,
}

/// How often the clock is looked at.
const LOOK: Duration = Duration::from_secs(60);
/// So many images are looked for at once; one whose server is slow holds up no other.
const AT_ONCE: usize = 4;

/// Follows the clock until the engine ends: looks for newer images as often as `images.auto_update_interval` says.
pub(crate) async fn follow(weak: std::sync::Weak<EngineInner>) {
    let Some(inner) = weak.upgrade() else { return };
    let env = inner.env.clone();
    drop(inner);
    let turns = Arc::new(tokio::sync::Semaphore::new(AT_ONCE));
    let context = Context::system();
    loop {
        env.sleep(LOOK).await;
        let Some(inner) = weak.upgrade() else { return };
        let engine = Engine { inner };
        for image in engine.inner().followed_images(env.now(), &engine.image_settings()) {
            // The others are due at the next look, too.
            let Ok(turn) = turns.clone().try_acquire_owned() else { break };
            let newer = match engine.note_look(&image).await {
                Ok(()) => engine.image_refresh(&context, &image.project, &image.fingerprint).await,
                Err(e) => Err(e),
            };
            env.spawn_task("image-follow", async move {
                report(&image, "no newer image could be looked for", settled(newer).await);
                drop(turn);
            });
        }
    }
}

/// Follows the clock until the engine ends: lets cached images go that nobody used for `images.remote_cache_expiry`.
pub(crate) async fn forget(weak: std::sync::Weak<EngineInner>) {
    let Some(inner) = weak.upgrade() else { return };
    let env = inner.env.clone();
    drop(inner);
    let context = Context::system();
    loop {
        env.sleep(LOOK).await;
        let Some(inner) = weak.upgrade() else { return };
        let engine = Engine { inner };
        for image in engine.inner().unused_images(env.now(), &engine.image_settings()) {
            let gone = engine.image_delete(&context, &image.project, &image.fingerprint).await;
            report(&image, "a cached image that nobody uses was not deleted", settled(gone).await);
        }
    }
}

async fn settled(operation: Result<LiveOperation>) -> Result<()> {
    ended(operation?).await.map(drop)
}

fn report(image: &Due, what: &str, done: Result<()>) {
    if let Err(e) = done {
        // The next look will do; servers are away now and then.
        tracing::info!(fingerprint = %image.fingerprint, project = %image.project, error = %e, "{what}");
    }
}
