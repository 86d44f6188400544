//! Images: the use cases.

pub mod publish;
pub mod push;
pub mod registries;
pub mod remote;
pub mod shared;

pub use crate::uploads::{ImageUpload, PartUpload};
use crate::{
    Engine, EngineInner, Records, Row,
    context::Context,
    db::Tx,
    operations::{LiveOperation, NewOperation},
    saga::{Saga, StepContext, runner},
};
use async_trait::async_trait;
use karst_agent::{AgentEvent, CallContext, ImageBuild, ImageImport, WithFds};
pub use karst_agent::{ImageFile, ImagePart};
use karst_model::{
    Config, Error, ImageId, NodeId, ProjectId, Result,
    access::Permission,
    image::{DiskFormat, Image, ImageAlias, ImageFacts, ImageOrigin, check_alias},
    instance::InstanceKind,
    project::Project,
};
use serde::{Deserialize, Serialize};
use std::time::Duration;

/// Lock target of an image.
pub fn lock(id: ImageId) -> String {
    format!("images/{id}")
}

/// What makes a project have images of its own.
pub(crate) const FEATURE: &str = "features.images";
const BUILD: Duration = Duration::from_secs(3600);
pub(crate) const CALL: Duration = Duration::from_secs(60);

/// What a user says of a new image.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageOptions {
    /// Fingerprint that it must have.
    pub fingerprint: Option<String>,
    /// Name of the uploaded file.
    pub filename: String,
    /// Visible to untrusted clients.
    pub public: bool,
    /// On top of the image's own.
    pub properties: Config,
    /// Names for it: (name, description).
    pub aliases: Vec<(String, String)>,
    /// An alias that exists is moved here instead of refused.
    pub move_aliases: bool,
    /// What is uploaded is a disk by itself, of this format.
    #[serde(default)]
    pub disk: Option<DiskFormat>,
    /// Until when it is vouched for; `None`: what its metadata says.
    #[serde(default)]
    pub expires_at: Option<jiff::Timestamp>,
    /// The server that it comes from.
    #[serde(default)]
    pub origin: Option<ImageOrigin>,
    /// Profiles of instances made of it; `None`: `default`.
    #[serde(default)]
    pub profiles: Option<Vec<String>>,
}

/// Replaces what a user may set of an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UpdateImage {
    /// Visible to untrusted clients.
    pub public: bool,
    /// Properties.
    pub properties: Config,
    /// Default profiles.
    pub profiles: Vec<String>,
    /// Follow the server that it came from; `None` keeps.
    pub auto_update: Option<bool>,
    /// Until when it is vouched for; the outer `None` keeps.
    pub expires_at: Option<Option<jiff::Timestamp>>,
    /// `spec_version` that was read (If-Match).
    pub if_version: Option<u64>,
}

impl EngineInner {
    /// An image by fingerprint, beginning of it, or alias; of two kinds under one name the wanted one.
    pub(crate) fn resolve_image(
        &self,
        records: &Records,
        project: ProjectId,
        reference: &str,
        kind: Option<InstanceKind>,
    ) -> Result<Row<Image>> {
        let found = records.image(project, reference).cloned();
        if kind == Some(InstanceKind::VirtualMachine)
            && !matches!(&found, Ok(i) if i.kind == InstanceKind::VirtualMachine)
            && let Ok(vm) = records.image(project, &format!("{reference}/vm"))
        {
            return Ok(vm.clone());
        }
        found
    }
}

/// Path of an image in the API.
fn path(fingerprint: &str) -> String {
    format!("/1.0/images/{fingerprint}")
}

impl Engine {
    /// All images of a project, newest first.
    ///
    /// # Errors
    /// Not found, forbidden.
    pub fn images(&self, context: &Context, project: &str) -> Result<Vec<Row<Image>>> {
        let project = self.project_of(context, project, FEATURE, Permission::ProjectView)?;
        let mut all: Vec<_> = self
            .inner()
            .inventory
            .read()
            .images
            .values()
            .filter(|i| i.project == project.id)
            .cloned()
            .collect();
        all.sort_by_key(|i| std::cmp::Reverse(i.uploaded_at));
        Ok(all)
    }

    /// An image by fingerprint, unique beginning of it, or alias.
    ///
    /// # Errors
    /// Not found, invalid when ambiguous, forbidden.
    pub fn image(&self, context: &Context, project: &str, reference: &str) -> Result<Row<Image>> {
        let project = self.project_of(context, project, FEATURE, Permission::ProjectView)?;
        self.inner().inventory.read().image(project.id, reference).cloned()
    }

    /// Aliases of a project, or of one image in it.
    ///
    /// # Errors
    /// Not found, forbidden.
    pub fn image_aliases(
        &self,
        context: &Context,
        project: &str,
        image: Option<ImageId>,
    ) -> Result<Vec<Row<ImageAlias>>> {
        let project = self.project_of(context, project, FEATURE, Permission::ProjectView)?;
        let records = self.inner().inventory.read();
        Ok(records
            .aliases()
            .filter(|a| a.project == project.id && image.is_none_or(|i| i == a.image))
            .cloned()
            .collect())
    }

    /// An alias; with a kind, that of an image of this kind (`NAME/vm` stands in for virtual machines).
    ///
    /// # Errors
    /// Not found, forbidden.
    pub fn image_alias(
        &self,
        context: &Context,
        project: &str,
        name: &str,
        kind: Option<InstanceKind>,
    ) -> Result<Row<ImageAlias>> {
        let project = self.project_of(context, project, FEATURE, Permission::ProjectView)?;
        let records = self.inner().inventory.read();
        let get =
            |n: &str| records.alias(project.id, n).filter(|a| kind.is_none_or(|k| k == a.kind)).cloned();
        let mut found = get(name);
        if found.is_none() && kind == Some(InstanceKind::VirtualMachine) {
            found = get(&format!("{name}/vm"));
        }
        found.ok_or_else(|| Error::not_found(format!("image alias {name:?} not found")))
    }

    /// Makes an alias.
    ///
    /// # Errors
    /// Invalid name, not found (image), conflict (taken), forbidden.
    pub async fn image_alias_create(
        &self,
        context: &Context,
        project: &str,
        name: &str,
        description: &str,
        target: &str,
    ) -> Result<()> {
        let project = self.project_of(context, project, FEATURE, Permission::ResourceEdit)?;
        check_alias("name", name)?;
        let inner = self.inner();
        inner
            .transact(|records, tx| {
                if records.alias(project.id, name).is_some() {
                    return Err(Error::conflict(format!("an image alias {name:?} exists already")).at("name"));
                }
                let image = records.image(project.id, target).map_err(|e| e.at("target"))?;
                tx.expect(image);
                tx.create(&ImageAlias {
                    project: project.id,
                    name: name.into(),
                    description: description.into(),
                    image: image.id,
                    kind: image.kind,
                });
                Ok(())
            })
            .await?;
        inner.announce(
            context,
            Some(project.id),
            "image-alias-created",
            format!("/1.0/images/aliases/{name}"),
        );
        Ok(())
    }

    /// Changes where an alias points and its text; `None` keeps.
    ///
    /// # Errors
    /// Not found, forbidden.
    pub async fn image_alias_update(
        &self,
        context: &Context,
        project: &str,
        name: &str,
        description: Option<&str>,
        target: Option<&str>,
    ) -> Result<()> {
        let project = self.project_of(context, project, FEATURE, Permission::ResourceEdit)?;
        let inner = self.inner();
        inner
            .transact(|records, tx| {
                let row = alias_row(records, &project, name)?;
                let mut alias = row.value.clone();
                if let Some(d) = description {
                    alias.description = d.into();
                }
                if let Some(t) = target.filter(|t| !t.is_empty()) {
                    let image = records.image(project.id, t).map_err(|e| e.at("target"))?;
                    tx.expect(image);
                    alias.image = image.id;
                    alias.kind = image.kind;
                }
                tx.replace(row, &alias);
                Ok(())
            })
            .await?;
        inner.announce(
            context,
            Some(project.id),
            "image-alias-updated",
            format!("/1.0/images/aliases/{name}"),
        );
        Ok(())
    }

    /// Renames an alias.
    ///
    /// # Errors
    /// Invalid name, not found, conflict (taken), forbidden.
    pub async fn image_alias_rename(
        &self,
        context: &Context,
        project: &str,
        name: &str,
        new: &str,
    ) -> Result<()> {
        let project = self.project_of(context, project, FEATURE, Permission::ResourceEdit)?;
        check_alias("name", new)?;
        let inner = self.inner();
        inner
            .transact(|records, tx| {
                let row = alias_row(records, &project, name)?;
                if records.alias(project.id, new).is_some() {
                    return Err(Error::conflict(format!("an image alias {new:?} exists already")).at("name"));
                }
                tx.delete(row);
                tx.create(&ImageAlias { name: new.into(), ..row.value.clone() });
                Ok(())
            })
            .await?;
        inner.announce(
            context,
            Some(project.id),
            "image-alias-renamed",
            format!("/1.0/images/aliases/{new}"),
        );
        Ok(())
    }

    /// Deletes an alias; the image stays.
    ///
    /// # Errors
    /// Not found, forbidden.
    pub async fn image_alias_delete(&self, context: &Context, project: &str, name: &str) -> Result<()> {
        let project = self.project_of(context, project, FEATURE, Permission::ResourceEdit)?;
        let inner = self.inner();
        inner
            .transact(|records, tx| {
                let row = alias_row(records, &project, name)?;
                tx.delete(row);
                Ok(())
            })
            .await?;
        inner.announce(
            context,
            Some(project.id),
            "image-alias-deleted",
            format!("/1.0/images/aliases/{name}"),
        );
        Ok(())
    }

    /// Makes an image of uploaded parts.
    ///
    /// # Errors
    /// Invalid options, forbidden; what is wrong with the files comes as the operation's failure.
    pub async fn image_import(
        &self,
        context: &Context,
        project: &str,
        mut upload: ImageUpload,
        parts: Vec<ImagePart>,
        options: ImageOptions,
    ) -> Result<LiveOperation> {
        let project = self.project_of(context, project, FEATURE, Permission::ResourceEdit)?;
        check_options(&options)?;
        let inner = self.inner();
        let operation = runner::start::<ImageCreate>(inner, context, |tx| {
            tx.expect(&project);
            let plan = ImagePlan {
                id: upload.id(),
                project: project.id,
                node: inner.node,
                content: ImageContent::Upload { parts: parts.clone() },
                options: options.clone(),
            };
            let mut new = NewOperation::task(
                "Importing image",
                Some(project.id),
                "images",
                path(&upload.id().to_string()),
            );
            new.may_cancel = true;
            Ok((plan, new))
        })
        .await?;
        // From here on it is the saga's to import or to drop.
        upload.given();
        Ok(operation)
    }

    /// Builds an image of a recipe such as `debian/12` or `ubuntu/24.04`. One that was built of the same recipe on the same day
    /// is taken as it is.
    ///
    /// # Errors
    /// Invalid options, forbidden; failures of the build come with the operation.
    pub async fn image_build(
        &self,
        context: &Context,
        project: &str,
        recipe: &str,
        kind: InstanceKind,
        mut options: ImageOptions,
    ) -> Result<LiveOperation> {
        let project = self.project_of(context, project, FEATURE, Permission::ResourceEdit)?;
        check_alias("recipe", recipe)?;
        if options.aliases.is_empty() {
            let suffix = if kind == InstanceKind::VirtualMachine { "/vm" } else { "" };
            options.aliases.push((format!("{recipe}{suffix}"), String::new()));
        }
        options.move_aliases = true;
        let today = self.inner().env.now().strftime("%Y%m%d").to_string();
        options.properties.insert("recipe".into(), recipe.into());
        options.properties.insert("serial".into(), today.clone());
        check_options(&options)?;
        let inner = self.inner();
        runner::start::<ImageCreate>(inner, context, |tx| {
            let records = inner.inventory.read();
            tx.expect(&project);
            let same = |k: &str, v: &str, i: &Image| i.properties.get(k).is_some_and(|x| x == v);
            let built = records.images.values().find(|i| {
                i.project == project.id
                    && i.kind == kind
                    && same("recipe", recipe, i)
                    && same("serial", &today, i)
            });
            let content = match built {
                Some(image) => {
                    tx.expect(image);
                    tx.expect_unlocked(&lock(image.id));
                    ImageContent::Existing { image: image.id }
                }
                None => ImageContent::Recipe { recipe: recipe.into(), instance_kind: kind },
            };
            let id = ImageId(inner.env.uuid());
            let plan =
                ImagePlan { id, project: project.id, node: inner.node, content, options: options.clone() };
            let mut new =
                NewOperation::task("Building image", Some(project.id), "images", path(&id.to_string()));
            new.may_cancel = true;
            Ok((plan, new))
        })
        .await
    }

    /// Replaces what a user may set of an image.
    ///
    /// # Errors
    /// Not found, precondition failed, forbidden.
    pub async fn image_update(
        &self,
        context: &Context,
        project: &str,
        reference: &str,
        request: UpdateImage,
    ) -> Result<()> {
        let project = self.project_of(context, project, FEATURE, Permission::ResourceEdit)?;
        let inner = self.inner();
        let fingerprint = inner
            .transact(|records, tx| {
                let row = records.image(project.id, reference)?;
                if request.if_version.is_some_and(|v| v != row.spec_version) {
                    return Err(Error::precondition_failed(
                        "the image has changed since it was read; read it again",
                    ));
                }
                tx.expect_unlocked(&lock(row.id));
                let mut image = row.value.clone();
                image.public = request.public;
                image.properties = request.properties.clone();
                image.profiles = request.profiles.clone();
                image.expires_at = request.expires_at.unwrap_or(image.expires_at);
                match (request.auto_update, &mut image.origin) {
                    (Some(follow), Some(origin)) if origin.from.alias.is_some() => {
                        origin.auto_update = follow
                    }
                    (Some(true), _) => {
                        let text = "the image came from no alias of a server that could have a newer one";
                        return Err(Error::invalid("auto_update", text));
                    }
                    _ => {}
                }
                image.spec_version += 1;
                tx.replace(row, &image);
                Ok(image.fingerprint)
            })
            .await?;
        inner.announce(context, Some(project.id), "image-updated", path(&fingerprint));
        Ok(())
    }

    /// Opens the files of an image as they were uploaded.
    ///
    /// # Errors
    /// Not found, forbidden.
    pub async fn image_export(
        &self,
        context: &Context,
        project: &str,
        reference: &str,
    ) -> Result<(Row<Image>, WithFds<Vec<ImageFile>>)> {
        let image = self.image(context, project, reference)?;
        let inner = self.inner();
        let files = inner.agents.get(inner.node)?.image_export(&CallContext::read(CALL), image.id).await?;
        Ok((image, files))
    }

    /// Deletes an image with its aliases. Instances that were made of it stay whole.
    ///
    /// # Errors
    /// Not found, conflict when busy, forbidden.
    pub async fn image_delete(
        &self,
        context: &Context,
        project: &str,
        reference: &str,
    ) -> Result<LiveOperation> {
        let project = self.project_of(context, project, FEATURE, Permission::ResourceEdit)?;
        let inner = self.inner();
        runner::start::<ImageDelete>(inner, context, |tx| {
            let records = inner.inventory.read();
            let row = records.image(project.id, reference)?;
            tx.expect(row);
            let path = path(&row.fingerprint);
            let plan = ImageDeletePlan { id: row.id, node: inner.node, path: path.clone() };
            Ok((plan, NewOperation::task("Deleting image", Some(project.id), "images", path)))
        })
        .await
    }
}

fn alias_row<'a>(records: &'a Records, project: &Project, name: &str) -> Result<&'a Row<ImageAlias>> {
    records.alias(project.id, name).ok_or_else(|| Error::not_found(format!("image alias {name:?} not found")))
}

fn check_options(options: &ImageOptions) -> Result<()> {
    for (n, (name, _)) in options.aliases.iter().enumerate() {
        check_alias(&format!("aliases[{n}].name"), name)?;
    }
    if let Some(f) = &options.fingerprint
        && (f.len() != 64 || !f.bytes().all(|b| b.is_ascii_hexdigit()))
    {
        return Err(Error::invalid(
            "fingerprint",
            format!("{f:?} is not a SHA-256 fingerprint (64 hex digits)"),
        ));
    }
    Ok(())
}

fn demand_new(records: &Records, project: ProjectId, fingerprint: &str) -> Result<()> {
    let mut all = records.images.values();
    if all.any(|i| i.project == project && i.fingerprint == fingerprint) {
        return Err(Error::conflict(format!("an image with fingerprint {fingerprint} exists already")));
    }
    Ok(())
}

/// Notes that a cached image is used, at most once an hour: it goes when it was not for long.
pub(crate) fn used(tx: &mut Tx, row: &Row<Image>, now: jiff::Timestamp) {
    let fresh = row.last_used_at.is_some_and(|t| now.duration_since(t).as_secs() < 3600);
    if !fresh && row.origin.as_ref().is_some_and(|o| o.cached) {
        tx.replace(row, &Image { last_used_at: Some(now), ..row.value.clone() });
    }
}

/// No alias of it is taken, unless it may be moved.
fn demand_unlike(records: &Records, project: ProjectId, options: &ImageOptions) -> Result<()> {
    let taken = |(n, _): &&(String, String)| records.alias(project, n).is_some();
    match options.aliases.iter().find(taken) {
        Some((taken, _)) if !options.move_aliases => {
            Err(Error::conflict(format!("an image alias {taken:?} exists already")).at("aliases"))
        }
        _ => Ok(()),
    }
}

/// The image must be new in its project, and be the one that was announced.
fn check_new(cx: &StepContext, project: ProjectId, options: &ImageOptions, facts: &ImageFacts) -> Result<()> {
    if let Some(wanted) = &options.fingerprint
        && !wanted.eq_ignore_ascii_case(&facts.fingerprint)
    {
        return Err(Error::invalid(
            "fingerprint",
            format!("the files have the fingerprint {}, not {wanted}", facts.fingerprint),
        ));
    }
    let records = cx.engine.inventory.read();
    demand_new(&records, project, &facts.fingerprint)?;
    demand_unlike(&records, project, options)
}

/// The record of a new image, with its aliases.
fn commit_new(
    engine: &EngineInner,
    tx: &mut Tx,
    (id, project): (ImageId, ProjectId),
    options: &ImageOptions,
    facts: &ImageFacts,
) -> Result<()> {
    let records = engine.inventory.read();
    let row = records.projects.get(&project);
    tx.expect(row.ok_or_else(|| Error::not_found("the project was deleted meanwhile"))?);
    tx.touch(&crate::tenancy::project_uses(project));
    // Two imports of the same files at once: the second is undone.
    demand_new(&records, project, &facts.fingerprint)?;
    let mut properties = facts.properties.clone();
    properties.extend(options.properties.clone());
    tx.take_name("images", &project.to_string(), &facts.fingerprint, &id.to_string());
    let stated =
        (facts.expires_at > 0).then(|| jiff::Timestamp::from_second(facts.expires_at).ok()).flatten();
    tx.create(&Image {
        id,
        project,
        fingerprint: facts.fingerprint.clone(),
        kind: facts.kind,
        application: facts.application.clone(),
        architecture: facts.architecture.clone(),
        size: facts.size,
        filename: options.filename.clone(),
        public: options.public,
        properties,
        profiles: options.profiles.clone().unwrap_or_else(|| vec!["default".into()]),
        templates: facts.templates.clone(),
        created_at: jiff::Timestamp::from_second(facts.created_at).ok(),
        uploaded_at: engine.env.now(),
        last_used_at: None,
        expires_at: options.expires_at.or(stated),
        origin: options.origin.clone(),
        spec_version: 1,
    });
    name_it(&records, tx, (id, project, facts.kind), options)
}

/// The aliases of an image.
fn name_it(
    records: &Records,
    tx: &mut Tx,
    (image, project, kind): (ImageId, ProjectId, InstanceKind),
    options: &ImageOptions,
) -> Result<()> {
    for (name, description) in &options.aliases {
        let alias = ImageAlias { project, name: name.clone(), description: description.clone(), image, kind };
        match records.alias(project, name) {
            Some(row) if options.move_aliases || row.image == image => tx.replace(row, &alias),
            Some(_) => {
                return Err(Error::conflict(format!("an image alias {name:?} exists already")).at("aliases"));
            }
            None => tx.create(&alias),
        }
    }
    Ok(())
}

/// What an operation tells of the image that it made.
fn told(fingerprint: &str, size: u64) -> serde_json::Map<String, serde_json::Value> {
    [("fingerprint".to_owned(), fingerprint.into()), ("size".to_owned(), size.to_string().into())]
        .into_iter()
        .collect()
}

/// Where the content of a new image comes from.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
enum ImageContent {
    Upload { parts: Vec<ImagePart> },
    Recipe { recipe: String, instance_kind: InstanceKind },
    Existing { image: ImageId },
}

/// Plan of [`ImageCreate`].
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ImagePlan {
    id: ImageId,
    project: ProjectId,
    node: NodeId,
    content: ImageContent,
    options: ImageOptions,
}

/// Outputs of [`ImageCreate`].
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct ImageOutputs {
    facts: Option<ImageFacts>,
}

/// Imports or builds the content on the host, then writes record and aliases.
pub struct ImageCreate;

impl ImageCreate {
    async fn build(
        cx: &StepContext,
        plan: &ImagePlan,
        recipe: &str,
        kind: InstanceKind,
    ) -> Result<ImageFacts> {
        let agent = cx.agent(plan.node)?;
        let request = ImageBuild { image: plan.id, recipe: recipe.to_owned(), kind };
        let context = cx.mutate(BUILD);
        let mut events = agent.events().await?;
        let mut build = agent.image_build(&context, request);
        loop {
            tokio::select! {
                biased;
                done = &mut build => return done,
                Some(event) = events.recv() => if let AgentEvent::ImageProgress { image, stage, percent } = event
                    && image == plan.id
                {
                    cx.engine.operations.progress(&cx.operation, |m| {
                        let percent = percent.map(|p| format!(" ({p}%)")).unwrap_or_default();
                        m.insert("create_image_from_recipe_progress".into(), format!("{stage}{percent}").into());
                    });
                },
            }
        }
    }
}

#[async_trait]
impl Saga for ImageCreate {
    const NAME: &'static str = "image-create";
    const STEPS: &'static [&'static str] = &["content"];
    type Plan = ImagePlan;
    type Outputs = ImageOutputs;

    fn locks(plan: &ImagePlan) -> Vec<String> {
        vec![lock(plan.id)]
    }

    fn begin(_: &ImagePlan, _: &EngineInner, _: &mut Tx) -> Result<()> {
        Ok(())
    }

    async fn run(cx: &StepContext, plan: &ImagePlan, outputs: &mut ImageOutputs, _: usize) -> Result<()> {
        let facts = match &plan.content {
            ImageContent::Existing { .. } => return Ok(()),
            ImageContent::Upload { parts } => {
                let request = ImageImport { image: plan.id, parts: parts.clone(), disk: plan.options.disk };
                cx.agent(plan.node)?.image_import(&cx.mutate(BUILD), request).await?
            }
            ImageContent::Recipe { recipe, instance_kind } => {
                Self::build(cx, plan, recipe, *instance_kind).await?
            }
        };
        check_new(cx, plan.project, &plan.options, &facts)?;
        outputs.facts = Some(facts);
        Ok(())
    }

    async fn undo(cx: &StepContext, plan: &ImagePlan, _: &ImageOutputs, _: usize) -> Result<()> {
        match plan.content {
            ImageContent::Existing { .. } => Ok(()),
            _ => cx.agent(plan.node)?.image_delete(&cx.mutate(CALL), plan.id).await,
        }
    }

    fn commit(plan: &ImagePlan, outputs: &ImageOutputs, engine: &EngineInner, tx: &mut Tx) -> Result<()> {
        match (&plan.content, &outputs.facts) {
            (ImageContent::Existing { image }, _) => {
                let records = engine.inventory.read();
                let project = records.projects.get(&plan.project);
                tx.expect(project.ok_or_else(|| Error::not_found("the project was deleted meanwhile"))?);
                tx.touch(&crate::tenancy::project_uses(plan.project));
                let row = records.images.get(image).ok_or_else(|| Error::not_found("the image is gone"))?;
                tx.expect(row);
                name_it(&records, tx, (row.id, plan.project, row.kind), &plan.options)
            }
            (_, None) => Err(Error::internal("an image's facts are missing", plan.id)),
            (_, Some(facts)) => commit_new(engine, tx, (plan.id, plan.project), &plan.options, facts),
        }
    }

    fn abort(_: &ImagePlan, _: &ImageOutputs, _: &EngineInner, _: &mut Tx) -> Result<()> {
        Ok(())
    }

    fn result(
        plan: &ImagePlan,
        outputs: &ImageOutputs,
        engine: &EngineInner,
    ) -> serde_json::Map<String, serde_json::Value> {
        let (fingerprint, size) = match (&plan.content, &outputs.facts) {
            (ImageContent::Existing { image }, _) => {
                let records = engine.inventory.read();
                records.images.get(image).map(|i| (i.fingerprint.clone(), i.size)).unwrap_or_default()
            }
            (_, Some(f)) => (f.fingerprint.clone(), f.size),
            _ => Default::default(),
        };
        told(&fingerprint, size)
    }

    fn announce(plan: &ImagePlan) -> Vec<(&'static str, String)> {
        match plan.content {
            ImageContent::Existing { .. } => vec![],
            _ => vec![("image-created", path(&plan.id.to_string()))],
        }
    }
}

/// Plan of [`ImageDelete`].
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ImageDeletePlan {
    id: ImageId,
    node: NodeId,
    path: String,
}

/// Deletes the content, then record and aliases. Content cannot be brought back: the step has no undo, and a failure
/// leaves an image that can be deleted again.
pub struct ImageDelete;

#[async_trait]
impl Saga for ImageDelete {
    const NAME: &'static str = "image-delete";
    const STEPS: &'static [&'static str] = &["content"];
    type Plan = ImageDeletePlan;
    type Outputs = ();

    fn retries(_: usize) -> u32 {
        5
    }
    fn locks(plan: &ImageDeletePlan) -> Vec<String> {
        vec![lock(plan.id)]
    }
    fn begin(_: &ImageDeletePlan, _: &EngineInner, _: &mut Tx) -> Result<()> {
        Ok(())
    }
    async fn run(cx: &StepContext, plan: &ImageDeletePlan, _: &mut (), _: usize) -> Result<()> {
        cx.agent(plan.node)?.image_delete(&cx.mutate(CALL), plan.id).await
    }
    async fn undo(_: &StepContext, _: &ImageDeletePlan, _: &(), _: usize) -> Result<()> {
        Ok(())
    }
    fn commit(plan: &ImageDeletePlan, _: &(), engine: &EngineInner, tx: &mut Tx) -> Result<()> {
        let records = engine.inventory.read();
        let Some(row) = records.images.get(&plan.id) else {
            return Ok(());
        };
        tx.delete(row);
        tx.release_name("images", &row.project.to_string(), &row.fingerprint, &row.id.to_string());
        for alias in records.aliases().filter(|a| a.image == plan.id) {
            tx.delete(alias);
        }
        Ok(())
    }
    fn abort(_: &ImageDeletePlan, _: &(), _: &EngineInner, _: &mut Tx) -> Result<()> {
        Ok(())
    }
    fn announce(plan: &ImageDeletePlan) -> Vec<(&'static str, String)> {
        vec![("image-deleted", plan.path.clone())]
    }
}
